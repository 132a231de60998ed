"""The ranks of a process group as the context of a packed row: what the model gathers travels by collectives."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch 2.13 gave them new names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, slots=True)
class GroupContext:
    """A `sala.model.rows.Context` over a process group of any backend; parts stand in the order of the group's ranks."""

    group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def gather(self, x: Tensor) -> Tensor:
        """Return the `x` of every rank, (ranks, *x.shape), on every rank.

        Gradients are added in float32 (float64 for float64) and returned in the dtype of `x`.
        """
        gathered: Tensor = _Gather.apply(x, self.group)
        return gathered


class _Gather(torch.autograd.Function):
    """All-gather, whose gradient is the reduce-scatter of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        ranks = dist.get_world_size(group)
        # flat: gloo wants the parts end to end
        gathered = x.new_empty(ranks * x.numel())
        _all_gather(gathered, x.reshape(-1), group=group)
        return gathered.view(ranks, *x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # bfloat16 would round at every rank that adds to a sum
        parts = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).reshape(-1)
        total = parts.new_empty(gradient[0].numel())
        _reduce_scatter(total, parts, group=ctx.group)
        return total.view(gradient.shape[1:]).to(gradient.dtype), None
