"""Layers run compiled: forward, and again where activations are checkpointed."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from sala.train import compile as compiling
from sala.train.loop import run_stage
from sala.train.parallel import ONE_PROCESS, Parallel, World
from sala.train.recipe import Mesh, Optimizer
from train import ranks

LAYERS, STEPS = 2, 2


def compiled_run(world: World, mesh: Mesh, mode: Any = "on") -> tuple[list[float], int, int]:
    """Return the losses of a checkpointed stage, how many graphs were compiled, and how often one of them ran forward."""
    graphs, calls, losses = [], [], []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lambda *given: (calls.append(graph), graph.forward(*given))[1]

    own, parallel = torch.compile, Parallel(world, mesh)
    with (
        mock.patch.object(
            compiling.torch, "compile", lambda function, **given: own(function, backend=counting, **given)
        ),
        mock.patch.object(compiling.shutil, "which", lambda name: name),
    ):
        run_stage(
            ranks.tiny(*["lightning-attn"] * LAYERS),
            ranks.stage_of("next_token", steps=STEPS, activation_checkpointing=True),
            ranks.Feed(parallel.data_rank, mesh.data_parallel),
            optimizer=Optimizer(),
            observer=lambda progress: losses.append(progress.loss),
            compile_mode=mode,
            parallel=parallel,
        )
    return losses, len(graphs), len(calls)


# dynamo touches the gradient of hidden states
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_layers_run_compiled_and_so_does_what_is_computed_again(tmp_path: Path) -> None:
    plain, *nothing = compiled_run(ONE_PROCESS, Mesh(), "off")
    assert nothing == [0, 0]
    sharded = ranks.spawn(2, compiled_run, tmp_path, Mesh(dp_shard=2))
    for losses, graphs, calls in (compiled_run(ONE_PROCESS, Mesh()), *sharded):
        # operators on packed rows divide a layer into several
        assert graphs > 1
        assert calls == graphs * LAYERS * STEPS * 2
        assert losses == pytest.approx(plain, rel=1e-5)
