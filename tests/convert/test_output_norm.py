"""Measured output norms start every head at the teacher's size."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from sala.convert.align import LinearTwins, watch_mixers
from sala.convert.output_norm import measure_output_norms, scale_output_norms
from sala.convert.transfer import hybrid_config, linear_twin

IDS = torch.arange(2 * 24).view(2, 24) % 50
SAMPLE = SimpleNamespace(input_ids=IDS, real=None, cu_seqlens=None)


@pytest.mark.parametrize(("gate_init", "passed"), [("open", 1.0), ("random", 0.5)])
def test_every_head_starts_at_the_teachers_size(
    teacher_of: Callable, family: str, gate_init: str, passed: float
) -> None:
    teacher = teacher_of(family)
    config = hybrid_config(teacher.config, ["lightning-attn"] * 4, rope=True, gates=False)
    generator = torch.Generator().manual_seed(0)
    twins = LinearTwins(
        teacher, [linear_twin(layer.self_attn, config, gate_init, generator) for layer in teacher.model.layers]
    )
    scale_output_norms(twins, measure_output_norms(twins, SAMPLE))
    sizes: list[torch.Tensor] = []

    def note(heads_BTD: torch.Tensor) -> None:
        sizes.append(heads_BTD.unflatten(-1, (4, 8)).square().mean(dim=(0, 1, 3)).sqrt())

    teacher.model.layers[2].self_attn.o_proj.register_forward_pre_hook(lambda _, given: note(given[0]))
    with torch.no_grad():
        x_BTD, rows, _ = watch_mixers(teacher, IDS)[2]
        note(twins.twins[2].o_norm(twins.twins[2].attend(x_BTD, rows).flatten(2)))
    torch.testing.assert_close(sizes[1] * passed, sizes[0])
    weights = twins.twins[2].o_norm.weight.view(4, 8)
    assert torch.equal(weights, weights[:, :1].expand(4, 8)), "one factor a head"
