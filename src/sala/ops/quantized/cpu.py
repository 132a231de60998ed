"""The linear map with a quantized weight in C++: see `sala/ops/native/quantized.cpp`."""

import torch
from torch import Tensor

from sala.ops.native import Function, operator
from sala.ops.pointwise.layout import count, rows
from sala.ops.quantized.weight import QuantizedWeight

_quantized_linear = Function("sala_quantized_linear", "iiiiiii pi pppp p p i")
# numbers of a row of x that share a scale
BLOCK = 128


def _fake(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    N: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], N))


@operator(
    "quantized_linear(Tensor x, Tensor words, Tensor scales, Tensor? offsets, Tensor? order, Tensor? bias, "
    "int bits, int group, int N) -> Tensor",
    _fake,
)
def _linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    N: int,
) -> Tensor:
    out = x.new_empty((*x.shape[:-1], N))
    (x, row), K = rows(x), x.shape[-1]
    bias = None if bias is None else bias.contiguous()
    block = min(-(-min(group, K) // 8) * 8, BLOCK)
    _quantized_linear(
        int(x.dtype == torch.bfloat16), bits, count(x), N, K, block, -(-min(group, K) // block),
        x.data_ptr(), row, *(None if part is None else part.data_ptr() for part in (order, words, scales, offsets, bias)),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias_N: Tensor | None) -> Tensor:
    """See `sala.ops.quantized`. Rows of x are rounded to 8 bits, by blocks of a group or 128 numbers with a scale each."""
    w = weight
    return _linear(x, w.words, w.scales, w.offsets, w.order, bias_N, w.bits, w.group, w.N)
