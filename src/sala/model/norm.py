"""Root mean square normalisation as the released checkpoint computes it."""

import torch
from torch import Tensor, nn

from sala.ops.pointwise import rms_norm


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


def norm_of(module: RMSNorm | None) -> tuple[Tensor, float] | None:
    """Return a norm as the operators that it is fused into take it."""
    return None if module is None else (module.weight, module.eps)
