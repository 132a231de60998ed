"""However many processes share a stage, it is the same stage."""

import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sala.recipe import Mesh
from sala.train.parallel import ONE_PROCESS, World, shadow, start_world
from train import ranks

STAGES = {
    "next_token": ranks.stage_of("next_token", sparse=True),
    "distill": ranks.stage_of("distill", steps=2, micro_batch=1, activation_checkpointing=True, trainable="mixers"),
    "align": ranks.stage_of("align", steps=2, clip_per_layer=True),
    "muon": ranks.stage_of("next_token", steps=2, optimizer={"kind": "muon"}),
    "lopsided": ranks.stage_of("next_token", steps=2, micro_batch=1),
    "lopsided distill": ranks.stage_of("distill", steps=2, micro_batch=1),
}
# of parameters; Muon rounds to bfloat16 what differs by the rounding of sums over ranks
TOLERANCES = {"muon": {"rtol": 1e-4, "atol": 2e-4}}


def every_stage(world: World, meshes: list[Mesh]) -> dict[Any, Any]:
    results = {}
    for mesh in meshes:
        for name, stage in STAGES.items():
            batches = ranks.lopsided if name.startswith("lopsided") else ranks.packed
            seen, model = ranks.run(world, mesh, stage, batches=batches)
            steps = [(step.loss, step.gradient_norm, *step.layer_errors) for step in seen]
            results[str(mesh), name] = steps, {k: v.detach() for k, v in model.named_parameters()}
    return results


def test_a_shadow_shares_memory_until_it_is_converted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    copy, numbers = shadow(model), model[0].weight.clone()
    assert copy[1].weight is copy[0].weight is not model[0].weight
    assert copy[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in model.parameters()]
    copy.bfloat16()
    copy[0].weight.data.zero_()
    assert model[0].weight.dtype == torch.float32 and torch.equal(model[0].weight, numbers)


@pytest.mark.parametrize(
    ("processes", "meshes"),
    [
        (2, [{"dp_shard": 2}, {"dp_replicate": 2}, {"cp": 2}]),
        (4, [{"dp_shard": 2, "cp": 2}, {"dp_replicate": 2, "dp_shard": 2}]),
    ],
)
def test_losses_and_parameters_are_those_of_one_process(processes: int, meshes: list[dict], tmp_path: Path) -> None:
    alone = every_stage(ONE_PROCESS, [Mesh()])
    there = [Mesh(**sizes) for sizes in meshes]
    for results in ranks.spawn(processes, every_stage, tmp_path, there):
        for (_, name), (steps, parameters) in results.items():
            wanted_steps, wanted = alone[str(Mesh()), name]
            torch.testing.assert_close(torch.tensor(steps), torch.tensor(wanted_steps), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(parameters, wanted, **TOLERANCES.get(name, {"rtol": 1e-4, "atol": 1e-5}))


def slow_main(world: World, folder: Path) -> str:
    """Return what rank 0 found after longer than torch lets a sum over ranks take."""
    dist.destroy_process_group()
    store = dist.FileStore(str(folder / "second"), world.ranks)
    with pytest.MonkeyPatch.context() as patched:
        start = partial(dist.init_process_group, store=store, rank=world.rank, world_size=world.ranks)
        patched.setattr(dist, "init_process_group", start)
        patched.setenv("RANK", str(world.rank))
        patched.setenv("WORLD_SIZE", str(world.ranks))
        with start_world() as started:
            distributed_c10d._set_pg_timeout(timedelta(milliseconds=1))
            found = started.first(lambda: time.sleep(0.1) or "found")
            started.gather(None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return found


def test_variables_that_are_empty_mean_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "")
    # products in bfloat16 need a group, of one process too
    for precision in ("float32", "bfloat16"):
        with start_world(precision) as world:
            assert (world.rank, world.ranks) == (0, 1)


def test_ranks_wait_for_what_one_measures(tmp_path: Path) -> None:
    assert ranks.spawn(2, slow_main, tmp_path, tmp_path) == ["found", "found"]
