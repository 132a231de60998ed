"""The definition of the linear map: in float64, rounded once at the end."""

from torch import Tensor


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """See `sala.ops.linear`."""
    out = x.double() @ weight_NK.double().T
    return (out if bias_N is None else out + bias_N.double()).to(x.dtype)
