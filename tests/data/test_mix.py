"""Laws of the mix."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sala.data import TASKS, Mix, Vocabulary
from sala.errors import RecipeError


@pytest.fixture
def make(words: Vocabulary, text: NDArray[np.int64]) -> Any:
    def mix(**changes: Any) -> Mix:
        settings = {"weights": dict.fromkeys(TASKS, 1.0), "length": 64, "batch_size": 16, "seed": 0} | changes
        return Mix(**settings, vocabulary=words, text=text)

    return mix


def test_a_batch_is_a_function_of_seed_and_step(make: Any) -> None:
    forwards = [make().batch(step) for step in range(4)]
    backwards = [make().batch(step) for step in reversed(range(4))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert (one.input_ids == other.input_ids).all()
        assert (one.loss_weights == other.loss_weights).all()
        assert one.tasks == other.tasks


def test_seeds_and_steps_give_different_batches(make: Any) -> None:
    batches = [make(seed=seed).batch(step).input_ids for seed in range(3) for step in range(3)]
    assert len({batch.tobytes() for batch in batches}) == 9


def test_tasks_come_by_weight(make: Any) -> None:
    tasks = make(weights={"text": 3, "copy": 1}, batch_size=1000).batch(0).tasks
    assert 700 < tasks.count("text") < 800
    assert tasks.count("text") + tasks.count("copy") == 1000


@pytest.mark.parametrize(("length", "batch_size"), [(32, 1), (63, 3), (130, 2)])
def test_batches_have_the_shape_asked_for(make: Any, length: int, batch_size: int) -> None:
    batch = make(length=length, batch_size=batch_size).batch(5)
    assert batch.input_ids.shape == batch.loss_weights.shape == (batch_size, length)
    assert batch.input_ids.dtype == np.int64
    assert batch.loss_weights.dtype == np.float32
    assert len(batch.tasks) == batch_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"text_retreival": 1}}, "did you mean 'text_retrieval'"),
        ({"weights": {"text": -1}}, "must not be negative"),
        ({"weights": {"text": 0}}, "add up to zero"),
        ({"length": 8}, "length 8 is too short"),
        ({"batch_size": 0}, "must be at least 1"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make(**changes)
