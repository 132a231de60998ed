"""Root mean square normalisation as the released checkpoint computes it, alone or within an operator."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from sala.ops.pointwise import add_rms_norm, add_scaled, rms_norm

Fused = tuple[Tensor, float]


class RMSNorm(nn.Module):
    """Mean square in float32, rounded to the input's dtype, then multiplied by the weight (no "+ 1")."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def normed_or_fused(norm: nn.Module | None, x: Tensor, dimensions: int = 1) -> tuple[Tensor, Fused | None]:
    """Return x and what an operator needs to norm it on the way, or x normed already where the module must be called.

    dimensions: how many of the last ones are normed together.
    """
    if norm is None:
        return x, None
    if _unnoticed(norm):
        assert isinstance(norm, RMSNorm)
        return x, (norm.weight, norm.eps)
    return norm(x.flatten(-dimensions)).view(x.shape), None


def added_and_normed(norm: nn.Module, x: Tensor, branch: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return sum = x + scale * branch, and the sum normed."""
    if _unnoticed(norm):
        assert isinstance(norm, RMSNorm)
        return add_rms_norm(x, branch, scale, norm.weight, norm.eps)
    total = add_scaled(x, branch, scale)
    return total, norm(total)


def _unnoticed(norm: nn.Module) -> bool:
    """Whether nobody sees if the module is called: none has wrapped it, hooked it or replaced its forward."""
    if type(norm) is not RMSNorm or _has_any_global_hook():
        return False
    # by the dictionary: this is asked of every norm in every decoding step
    own = norm.__dict__
    return "forward" not in own and not (
        own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_pre_hooks"] or own["_backward_hooks"]
    )
