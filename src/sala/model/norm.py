"""Root mean square normalisation as the released checkpoint computes it."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Mean square in float32, rounded to the input's dtype, then multiplied by the weight (no "+ 1")."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
