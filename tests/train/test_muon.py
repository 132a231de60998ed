"""Muon moves matrices as torch's own does, whoever holds them."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sala.train.muon import Muon, orthogonal, rows_by_rank
from sala.train.parallel import ONE_PROCESS, World, whole
from train import ranks

# rows that divide by four ranks and rows that do not; fewer rows than ranks, one; more matrices than two rounds
SHAPES = [(16, 24), (7, 5), (5, 16), (1, 9), (33, 8), (9, 3), (2, 2), (24, 16), (16, 24)]
RATE, DECAY, STEPS = 0.1, 0.2, 3


def matrices(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def moved(world: World, meshes: list[tuple[int, ...]]) -> list[list[torch.Tensor]]:
    """Return matrices and momenta after some steps on each mesh; on the mesh () they are whole."""
    results = []
    for sizes in meshes:
        mesh = init_device_mesh("cpu", sizes) if sizes else None
        split = [*[Replicate()] * (len(sizes) - 1), Shard(0)]

        def placed(tensor: torch.Tensor, mesh: object = mesh, split: list = split) -> torch.Tensor:
            return tensor if mesh is None else distribute_tensor(tensor, mesh, split)

        parameters = [nn.Parameter(placed(matrix)) for matrix in matrices(0)]
        frozen = nn.Parameter(placed(torch.ones(3, 3)))
        optimizer = Muon([*parameters, frozen], momentum=0.9, weight_decay=DECAY)
        optimizer.param_groups[0]["lr"] = RATE
        for step in range(STEPS):
            for parameter, gradient in zip(parameters, matrices(1 + step), strict=True):
                parameter.grad = placed(gradient)
            optimizer.step()
        momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
        assert frozen not in optimizer.state and torch.equal(whole(frozen), torch.ones(3, 3))
        results.append([whole(tensor).detach() for tensor in (*parameters, *momenta)])
    return results


def test_one_process_is_torchs_own() -> None:
    parameters = [nn.Parameter(matrix) for matrix in matrices(0)]
    own = torch.optim.Muon(
        parameters, lr=RATE, weight_decay=DECAY, momentum=0.9, adjust_lr_fn="match_rms_adamw", eps=1e-7
    )
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, matrices(1 + step), strict=True):
            parameter.grad = gradient
        own.step()
    expected = [*parameters, *(own.state[parameter]["momentum_buffer"] for parameter in parameters)]
    (results,) = moved(ONE_PROCESS, [()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, expected, strict=True))


def test_the_same_gradients_on_any_mesh_are_the_same_bits(tmp_path: Path) -> None:
    (alone,) = moved(ONE_PROCESS, [()])
    for results in ranks.spawn(4, moved, tmp_path, [(4,), (2, 2), (4, 1)]):
        for there in results:
            assert all(torch.equal(mine, one) for mine, one in zip(there, alone, strict=True))


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (1, 5)])
def test_singular_values_end_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
    assert values.min() > 0.6 and values.max() < 1.3


def test_every_row_is_some_ranks() -> None:
    for rows in range(1, 12):
        for size in range(1, 6):
            pieces = [len(piece) for piece in torch.zeros(rows).chunk(size)]
            assert rows_by_rank(rows, size) == pieces + [0] * (size - len(pieces))
