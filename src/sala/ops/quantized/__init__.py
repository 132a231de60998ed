"""A linear map with a weight of 4 or 8 bits: y = x W^T + b, without making numbers of the whole matrix."""

from torch import Tensor

from sala.errors import InputError
from sala.ops import dispatch
from sala.ops.quantized.weight import QuantizedWeight, dequantize, pack_codes, pack_words, unpack_words, words_of

__all__ = [
    "QuantizedWeight",
    "dequantize",
    "pack_codes",
    "pack_words",
    "quantized_linear",
    "unpack_words",
    "words_of",
]


def quantized_linear(
    x: Tensor, weight: QuantizedWeight, bias_N: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Return x W^T + b, summed in float32 or exactly and rounded once.

    Args:
        x: (..., K), floating point, on the weight's device. The `cpu` backend rounds it to 8 bits by blocks of a row.
        weight: (N, K).
        bias_N: (N,) or None, of x's dtype.

    Returns:
        (..., N), of x's dtype.

    Raises:
        InputError: shapes do not fit together, or x are integers.
        BackendError: the backend named cannot run here or on these tensors.
    """
    if x.ndim == 0 or x.shape[-1] != weight.K:
        raise InputError(
            f"x has shape {tuple(x.shape)}, the weight ({weight.N}, {weight.K}); expected (..., {weight.K})"
        )
    if bias_N is not None and bias_N.shape != (weight.N,):
        raise InputError(f"the bias has shape {tuple(bias_N.shape)}; expected ({weight.N},)")
    if not x.is_floating_point():
        raise InputError(f"x is {x.dtype}; expected floating point")
    return dispatch.choose("quantized", backend, (x, bias_N)).quantized_linear(x, weight, bias_N)
