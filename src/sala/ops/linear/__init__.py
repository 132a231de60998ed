"""A linear map: y = x W^T + b, at the speed of memory where few rows are multiplied, as in a decoding step."""

from torch import Tensor

from sala.errors import InputError
from sala.ops import dispatch

__all__ = ["linear"]


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Return x W^T + b, summed in float32 and rounded once.

    Args:
        x: (..., K), floating point.
        weight_NK: (N, K), of x's dtype on x's device.
        bias_N: (N,) or None.
        backend: "auto" takes the fastest for these tensors: a kernel of ours for few rows on a CPU, else torch's own product.

    Returns:
        (..., N), of x's dtype.

    Raises:
        InputError: shapes do not fit together, or the numbers are integers.
        BackendError: the backend named cannot run here or on these tensors.
    """
    if x.ndim == 0 or weight_NK.ndim != 2 or x.shape[-1] != weight_NK.shape[1]:
        raise InputError(
            f"x has shape {tuple(x.shape)} and the weight {tuple(weight_NK.shape)}; expected (..., K) and (N, K)"
        )
    if bias_N is not None and bias_N.shape != weight_NK.shape[:1]:
        raise InputError(f"the bias has shape {tuple(bias_N.shape)}; expected ({weight_NK.shape[0]},)")
    if not (x.is_floating_point() and weight_NK.is_floating_point()):
        raise InputError(f"x is {x.dtype} and the weight {weight_NK.dtype}; expected floating point")
    return dispatch.choose("linear", backend, (x, weight_NK, bias_N)).linear(x, weight_NK, bias_N)
