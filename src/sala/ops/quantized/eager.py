"""The linear map with a quantized weight in plain torch: numbers are made of some rows of the matrix at a time."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from sala.ops.quantized.weight import QuantizedWeight, dequantize

# rows of the matrix whose numbers exist at once
BLOCK_ROWS = 1024


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias_N: Tensor | None) -> Tensor:
    """See `sala.ops.quantized`. Differentiable in x and bias."""
    parts = [
        linear(x, dequantize(weight, torch.float32, first, first + BLOCK_ROWS).to(x.dtype))
        for first in range(0, weight.N, BLOCK_ROWS)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return out if bias_N is None else out + bias_N
