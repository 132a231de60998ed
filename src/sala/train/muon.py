"""Muon (Jordan 2024): momentum, orthogonalised a matrix at a time; of sharded matrices each rank takes some in full."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# a, b, c of X <- a X + (b A + c A^2) X with A = X X^T, steep at 0 (Jordan 2024)
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about U V^T of a matrix U S V^T, (M, N), in bfloat16, by Newton-Schulz iterations; its singular values end near 1."""
    a, b, c = COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.bfloat16().T if tall else matrix.bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with updates of AdamW's size (Liu et al. 2025, Muon is scalable), of sharded matrices too.

    A DTensor is split by rows over the last dimension of its mesh, and the same along the others. Momentum stays as its
    matrix is. What a step communicates is rounded to bfloat16 before, as an update is anyway: on any number of ranks the
    same gradients give the same bits.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, momentum: float, weight_decay: float):
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient. Collective: all ranks hold gradients of the same ones."""
        for group in self.param_groups:
            # the largest first, and those of a size together: a round lasts as long as its largest matrix
            moving = sorted((p for p in group["params"] if p.grad is not None), key=nn.Parameter.numel, reverse=True)
            ranks = moving[0].device_mesh.size() if moving and isinstance(moving[0], DTensor) else 1
            for start in range(0, len(moving), ranks):
                self._move(moving[start : start + ranks], group)

    def _move(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        updates = [self._update(matrix, group["momentum"]) for matrix in matrices]
        first, shapes = matrices[0], [matrix.shape for matrix in matrices]
        if isinstance(first, DTensor):
            updates = _dealt(updates, shapes, first.device_mesh)
        else:
            updates = [orthogonal(update) for update in updates]
        for matrix, update in zip(matrices, updates, strict=True):
            rate = group["lr"] * 0.2 * math.sqrt(max(matrix.shape))
            _local(matrix).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _update(self, matrix: Tensor, momentum: float) -> Tensor:
        """Take note of a gradient, and return this rank's rows of Nesterov's update in bfloat16."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        gradient, remembered = _local(matrix.grad), _local(state["momentum_buffer"])
        remembered.lerp_(gradient, 1 - momentum)
        return gradient.lerp(remembered, momentum).bfloat16()


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _dealt(pieces: list[Tensor], shapes: list[Size], mesh: DeviceMesh) -> list[Tensor]:
    """Return this rank's rows of orthogonalised matrices, one a rank of the mesh or fewer; matrix i is the work of rank i.

    Ranks of one replica hold a matrix between them and exchange its rows; then replicas tell each other their results.
    """
    shards, group = mesh.size(mesh.ndim - 1), mesh.get_group(mesh.ndim - 1)
    if mesh.ndim == 1:
        return _exchanged(pieces, shapes, group)
    replica, replicas = mesh.get_local_rank(0), mesh.size(0)
    of_replica = [slice(start, start + shards) for start in range(0, replicas * shards, shards)]
    sizes = [sum(piece.numel() for piece in pieces[those]) for those in of_replica]
    # all send as much as the largest
    own = pieces[0].new_zeros(max(sizes))
    done = _exchanged(pieces[of_replica[replica]], shapes[of_replica[replica]], group)
    if done:
        torch.cat([piece.flatten() for piece in done], out=own[: sizes[replica]])
    parts = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(parts, own, group=mesh.get_group(0))
    results = zip(parts, sizes, of_replica, strict=True)
    return [rows for part, size, those in results for rows in _split_like(part[:size], pieces[those])]


def _exchanged(pieces: list[Tensor], shapes: list[Size], group: ProcessGroup) -> list[Tensor]:
    """Return this rank's rows of orthogonalised matrices, one a rank of the group or fewer; matrix i is the work of rank i."""
    if not pieces:
        return []
    ranks, rank = group.size(), group.rank()
    sent = torch.cat([piece.flatten() for piece in pieces])
    of_matrix = [piece.numel() for piece in pieces] + [0] * (ranks - len(pieces))
    shape = shapes[rank] if rank < len(shapes) else Size((0, 0))
    of_rank = [rows * shape[1] for rows in rows_by_rank(shape[0], ranks)]
    whole = sent.new_empty(sum(of_rank))
    dist.all_to_all_single(whole, sent, of_rank, of_matrix, group=group)
    if len(whole):
        whole = orthogonal(whole.view(shape)).flatten()
    back = torch.empty_like(sent)
    dist.all_to_all_single(back, whole, of_matrix, of_rank, group=group)
    return _split_like(back, pieces)


def rows_by_rank(rows: int, ranks: int) -> list[int]:
    """Return how many rows of a matrix each rank holds: those of `torch.chunk`, and none beyond."""
    most = -(-rows // ranks)
    return [min(most, max(0, rows - most * rank)) for rank in range(ranks)]


def _split_like(flat: Tensor, pieces: Sequence[Tensor]) -> list[Tensor]:
    return [part.view_as(piece) for part, piece in zip(flat.split([p.numel() for p in pieces]), pieces, strict=True)]
