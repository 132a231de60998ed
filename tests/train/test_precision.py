"""Products in bfloat16; what is remembered, and what is summed over ranks, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sala.recipe import Mesh
from sala.train.parallel import ONE_PROCESS, World, start_world
from train import ranks

STAGES = {
    "next_token": ranks.stage_of("next_token", steps=4, optimizer={"kind": "muon"}, activation_checkpointing=True),
    "distill": ranks.stage_of("distill", steps=4),
    "align": ranks.stage_of("align", steps=4),
}


class Seen(TorchDispatchMode):
    """Notes the dtypes of matrix products and of sums over ranks; as a stage's saver, of what it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[torch.dtype] = set()
        self.sums: set[torch.dtype] = set()
        self.remembered: set[torch.dtype] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        where = {"aten::mm": self.products, "c10d::_reduce_scatter_base_": self.sums, "c10d::allreduce_": self.sums}
        if (noted := where.get(operator.name())) is not None:
            noted |= {x.dtype for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)}
        return operator(*arguments, **(named or {}))

    def restore(self, state: Any, feed: Any) -> None:
        return None

    def after(self, progress: Any, state: Any, feed: Any) -> None:
        self.remembered |= {x.dtype for x in tree_leaves(state())}


def every_stage(world: World, mesh: Mesh, precision: torch.dtype) -> dict[str, list[float]]:
    losses = {}
    for name, stage in STAGES.items():
        seen = Seen()
        with seen:
            steps, model = ranks.run(world, mesh, stage, precision, saver=seen)
        losses[name] = [step.loss for step in steps]
        assert seen.remembered == {torch.float32} == {parameter.dtype for parameter in model.parameters()}
        assert precision in seen.products
        if world.ranks > 1:
            # the loop's own numbers are float64
            assert torch.float32 in seen.sums and seen.sums <= {torch.float32, torch.float64}
    return losses


def test_losses_in_bfloat16_are_near_those_in_float32(tmp_path: Path) -> None:
    plain = every_stage(ONE_PROCESS, Mesh(), torch.float32)
    with start_world("bfloat16") as world:
        alone = every_stage(world, Mesh(), torch.bfloat16)
    for losses in (alone, *ranks.spawn(2, every_stage, tmp_path, Mesh(dp_shard=2), torch.bfloat16)):
        for name in STAGES:
            assert losses[name] == pytest.approx(plain[name], rel=1e-2)
