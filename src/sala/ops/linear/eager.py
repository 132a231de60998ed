"""The linear map by torch's own product: differentiable, on any device, for any number of rows."""

from torch import Tensor
from torch.nn.functional import linear as torch_linear


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """See `sala.ops.linear`."""
    return torch_linear(x, weight_NK, bias_N)
