"""Alignment brings every twin nearer to its layer, and leaves the teacher alone."""

from collections.abc import Callable

import torch

from sala.convert.align import LinearTwins
from sala.convert.transfer import hybrid_config, linear_twin, unshare
from sala.recipe import Optimizer, Stage
from sala.train.batches import StepFeed, WindowBatch
from sala.train.loop import Progress, run_stage

STAGE = Stage.model_validate(
    {
        "name": "align",
        "loss": "align",
        "length": 24,
        "batch": 4,
        "steps": 30,
        "learning_rate": {"peak": 0.01},
        "data": {"text": 1},
    }
)


def batch(step: int) -> WindowBatch:
    ids = torch.randint(50, (4, 24), generator=torch.Generator().manual_seed(step))
    return WindowBatch(ids, torch.ones(4, 24), ("text",) * 4)


def test_every_layer_comes_nearer_and_the_teacher_stays(teacher_of: Callable, family: str) -> None:
    teacher = teacher_of(family)
    before = [parameter.detach().clone() for parameter in teacher.parameters()]
    config = hybrid_config(teacher.config, ["lightning-attn"] * 4, rope=True, gates=False)
    generator = torch.Generator().manual_seed(0)
    twins = LinearTwins(
        teacher, [unshare(linear_twin(layer.self_attn, config, "random", generator)) for layer in teacher.model.layers]
    )
    assert all(name.startswith("twins.") for name, _ in twins.named_parameters())
    seen: list[Progress] = []
    run_stage(twins, STAGE, StepFeed(batch), optimizer=Optimizer(), observer=seen.append, compile_mode="off")
    first, last = (torch.tensor(progress.layer_errors) for progress in (seen[0], seen[-1]))
    assert first.shape == (4,)
    assert (last < 0.9 * first).all()
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert not any(layer.self_attn._forward_hooks for layer in teacher.model.layers), "hooks end with the forward pass"


def test_a_twin_sees_the_teachers_input_whatever_the_other_twins_do(teacher_of: Callable) -> None:
    teacher = teacher_of()
    config = hybrid_config(teacher.config, ["lightning-attn"] * 4, rope=True, gates=False)
    generator = torch.Generator().manual_seed(0)
    twins = LinearTwins(
        teacher, [unshare(linear_twin(layer.self_attn, config, "open", generator)) for layer in teacher.model.layers]
    )
    ids = batch(0).input_ids
    with torch.no_grad():
        expected = twins(ids)
        for parameter in twins.twins[0].parameters():
            parameter.zero_()
        again = twins(ids)
    for layer in (1, 2, 3):
        torch.testing.assert_close(again[layer], expected[layer])
