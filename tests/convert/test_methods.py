"""Every way to choose keeps the one layer that no other mixer can replace, says so surely, and leaves the teacher as it was."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from sala.convert.bootstrap import Outcomes
from sala.convert.methods import Choice, by_scores, greedy, joint_gates, kl_guided

NEEDED = 2
WINDOWS = [torch.arange(start, start + 24) % 50 for start in (0, 7, 19)]


@pytest.fixture
def replaceable(teacher_of: Callable) -> tuple[Any, list[Any]]:
    """A teacher, and mixers that do what its own do but for one layer, which forgets everything."""
    teacher = teacher_of()
    mixers = [deepcopy(layer.self_attn) for layer in teacher.model.layers]
    mixers[NEEDED].o_proj.weight.data.zero_()
    return teacher, mixers


def kl(teacher: Any, mixers: list[Any]) -> Choice:
    return kl_guided(teacher, mixers, WINDOWS, keep=1)


def one_by_one(teacher: Any, mixers: list[Any]) -> Choice:
    return greedy(teacher, mixers, WINDOWS, keep=1)


def gates(teacher: Any, mixers: list[Any]) -> Choice:
    with torch.no_grad():
        target = teacher(WINDOWS[0][None], use_cache=False).logits.log_softmax(-1)

    def loss(model: Any, seed: int, step: int) -> tuple[Tensor, int]:
        own = model(WINDOWS[0][None], use_cache=False).logits.log_softmax(-1)
        return 10 * (target.exp() * (target - own)).sum(-1).mean(), 24

    return joint_gates(teacher, mixers, loss, keep=1, steps=25, seeds=(0, 1))


@pytest.mark.parametrize("method", [kl, one_by_one, gates])
def test_the_layer_that_is_needed_is_kept(method: Callable[..., Choice], replaceable: tuple[Any, list[Any]]) -> None:
    teacher, mixers = replaceable
    before = [layer.self_attn for layer in teacher.model.layers]
    numbers = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    choice = method(teacher, mixers)
    assert choice.kept == (NEEDED,)
    assert choice.frequency == pytest.approx([float(layer == NEEDED) for layer in range(4)])
    assert choice.tokens > 0
    assert [layer.self_attn for layer in teacher.model.layers] == before
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in numbers.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_what_is_read_is_counted(replaceable: tuple[Any, list[Any]]) -> None:
    teacher, mixers = replaceable
    read = sum(map(len, WINDOWS))
    # the teacher once; of four candidates 4, 3, 2 and 1 layers, and each layer once for those above it
    assert kl(teacher, mixers).tokens == read * (1 + (4 + 3 + 2 + 1 + 4) / 4)
    # the teacher once, then 4, 3 and 2 candidates
    assert one_by_one(teacher, mixers).tokens == read * (1 + 4 + 3 + 2)
    assert gates(teacher, mixers).tokens == 3 * 24 * 25 * 2


def test_scores_choose_as_a_conversion_does() -> None:
    recall = [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    outcomes = Outcomes.of(recall, [[0.5, 0.5]] * 3)
    choice = by_scores("recall_drop", outcomes, 1, tokens=100, epsilon=0.1)
    assert choice.kept == (1,) and choice.frequency[1] > 0.8 and choice.tokens == 100 * (1 + 2)
