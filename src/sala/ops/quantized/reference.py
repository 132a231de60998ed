"""The definition of the linear map with a quantized weight: in float64, rounded once at the end."""

from torch import Tensor

from sala.ops.quantized.weight import QuantizedWeight, dequantize


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias_N: Tensor | None) -> Tensor:
    """See `sala.ops.quantized`."""
    out = x.double() @ dequantize(weight, x.double().dtype).T
    return (out if bias_N is None else out + bias_N.double()).to(x.dtype)
