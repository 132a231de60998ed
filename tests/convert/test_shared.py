"""Candidates of a selection share the layers below the swapped one, and are what they were without that."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from sala.convert.align import swapped
from sala.convert.choose import Scorers, score_layers
from sala.convert.plan import make_twins
from sala.convert.shared import LowerStates
from sala.convert.transfer import unshare
from sala.recipe import Conversion, Keep

ITEMS = [torch.arange(2 * 20).view(2, 20) % 50, torch.arange(12)[None] % 7, torch.arange(5, 17)[None]]


def candidates(teacher: Any) -> list[Any]:
    settings = Conversion(keep=Keep(count=1))
    return list(make_twins(teacher, settings, torch.Generator().manual_seed(0), unshare).twins)


def answers(model: Any) -> list[Any]:
    with torch.no_grad():
        return [model(ids, use_cache=False).logits for ids in ITEMS]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 3), (2, 0, 3, 3)])
def test_a_candidate_answers_as_it_does_alone(teacher_of: Callable, any_family: str, order: tuple[int, ...]) -> None:
    teacher = teacher_of(any_family)
    twins, states, layers = candidates(teacher), LowerStates(), list(teacher.model.layers)
    for layer in order:
        with swapped(teacher, {layer: twins[layer]}):
            alone = answers(teacher)
            with states.below(teacher, layer):
                shared = answers(teacher)
                copied = answers(deepcopy(teacher))
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(alone, copied, strict=True))
    assert list(teacher.model.layers) == layers


def test_layers_below_read_an_item_once(teacher_of: Callable) -> None:
    teacher, calls = teacher_of(), [0] * 4
    for index, layer in enumerate(teacher.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    scorers = Scorers(lambda model: [x.mean().item() for x in answers(model)], lambda model: [0.0, 1.0])
    score_layers(teacher, candidates(teacher), scorers, lambda n, one: [one(i) for i in range(n)], lambda text: None)
    # layer i is in the candidates up to i, and is passed once by those above
    assert calls == [3 * (1 + 1), 3 * (2 + 1), 3 * (3 + 1), 3 * 4]
