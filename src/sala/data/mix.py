"""A weighted mix of tasks as a stream of batches that resumes exactly: a batch is a pure function of seed and step."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sala.data.tasks import TASKS
from sala.data.tokenizer import Vocabulary
from sala.errors import RecipeError, nearest

SHORTEST_WINDOW = 32


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows for one step; `loss_weights[b, t]` weighs the prediction of token t, so index 0 is always zero."""

    input_ids: NDArray[np.int64]  # (B, T)
    loss_weights: NDArray[np.float32]  # (B, T)
    tasks: tuple[str, ...]  # (B,)


@dataclass(frozen=True)
class Mix:
    """Batches of `batch_size` windows of `length` tokens; each window's task is drawn by `weights`.

    `text` (tokens,) is the stream that text and text haystacks are cut from. Raises RecipeError for an unknown task, a
    weight below zero, or sizes that hold no task.
    """

    weights: Mapping[str, float]
    length: int
    batch_size: int
    seed: int
    vocabulary: Vocabulary
    text: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if name not in TASKS:
                raise RecipeError(f"data task {name!r} is unknown; known: {', '.join(TASKS)}{nearest(name, TASKS)}")
            if not weight >= 0:
                raise RecipeError(f"data weight {name}={weight} must not be negative")
        if not sum(self.weights.values()) > 0:
            raise RecipeError(f"data weights {dict(self.weights)} add up to zero; give at least one task a weight")
        if self.length < SHORTEST_WINDOW:
            raise RecipeError(f"length {self.length} is too short for the tasks; at least {SHORTEST_WINDOW}")
        if self.batch_size < 1:
            raise RecipeError(f"batch {self.batch_size} must be at least 1")

    def batch(self, step: int) -> Batch:
        """Return the batch of `step`, whatever was asked for before."""
        rng = np.random.default_rng((self.seed, step))
        names = list(self.weights)
        probabilities = np.array([self.weights[name] for name in names], np.float64)
        drawn = rng.choice(len(names), self.batch_size, p=probabilities / probabilities.sum())
        tasks = tuple(names[i] for i in drawn)
        windows = [TASKS[task](rng, self.length, self.vocabulary, self.text) for task in tasks]
        return Batch(
            input_ids=np.stack([window.tokens for window in windows]),
            loss_weights=np.stack([window.loss_weights for window in windows]),
            tasks=tasks,
        )
