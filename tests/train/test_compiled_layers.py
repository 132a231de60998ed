"""Layers run compiled: forward, and again where activations are checkpointed."""

from typing import Any
from unittest import mock

import pytest
import torch

from sala.recipe import Mesh, Optimizer
from sala.train import compile as compiling
from sala.train.loop import run_stage
from sala.train.parallel import ALONE, Parallel, start_world
from train import ranks

LAYERS, STEPS = 2, 2


def compiled_run(parallel: Parallel, mode: Any = "on") -> tuple[list[float], int, int]:
    """Return the losses of a checkpointed stage, how many graphs were compiled, and how often one of them ran forward."""
    graphs, calls, losses = [], [], []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lambda *given: (calls.append(graph), graph.forward(*given))[1]

    own = torch.compile
    with (
        mock.patch.object(
            compiling.torch, "compile", lambda function, **given: own(function, backend=counting, **given)
        ),
        mock.patch.object(compiling.shutil, "which", lambda name: name),
    ):
        run_stage(
            ranks.tiny(*["lightning-attn"] * LAYERS),
            ranks.stage_of("next_token", steps=STEPS, activation_checkpointing=True),
            ranks.Feed(0, 1),
            optimizer=Optimizer(),
            observer=lambda progress: losses.append(progress.loss),
            compile_mode=mode,
            parallel=parallel,
        )
    return losses, len(graphs), len(calls)


# dynamo touches the gradient of hidden states
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_layers_run_compiled_and_so_does_what_is_computed_again() -> None:
    plain, *nothing = compiled_run(ALONE, "off")
    assert nothing == [0, 0]
    runs = [compiled_run(ALONE)]
    # sharded, over one rank
    with start_world("bfloat16") as world:
        runs.append(compiled_run(world.parallel(Mesh(), "bfloat16")))
    for losses, graphs, calls in runs:
        # operators on packed rows divide a layer into several
        assert graphs > 1
        assert calls == graphs * LAYERS * STEPS * 2
        assert losses == pytest.approx(plain, rel=1e-2)
    assert runs[0][0] == pytest.approx(plain, rel=1e-6)
