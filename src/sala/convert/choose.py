"""Choosing the layers that stay attention: scores of every swapped layer, and the record of the choice."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sala.convert.align import swapped
from sala.convert.bootstrap import Outcomes, bootstrap
from sala.convert.select import LayerScores, importance, select
from sala.convert.selection import Selection
from sala.convert.shared import LowerStates
from sala.errors import RecipeError
from sala.recipe import Conversion, Keep

# model -> the outcome of every item, the same items for every model; or their mean alone, where they are not known
Score = Callable[[Any], float | Sequence[float]]
# (how many, index -> result) -> all results; it may know some already
Each = Callable[[int, Callable[[int], Any]], list[Any]]


@dataclass(frozen=True, slots=True)
class Scorers:
    """What layers are chosen by; in both, higher is better. Asked for every swapped layer, who then reads `tokens`."""

    recall: Score
    language: Score
    tokens: int = 0


def num_kept(keep: Keep, num_layers: int) -> int:
    """Return how many layers stay attention: HALO's floor of the fraction, at least one."""
    if keep.count is not None:
        return keep.count
    return max(1, int(num_layers * (keep.fraction or 0)))


@torch.no_grad()
def score_layers(
    teacher: Any, twins: Sequence[nn.Module], scorers: Scorers, each: Each, say: Callable[[str], None]
) -> tuple[LayerScores, Outcomes | None]:
    """Score the models M_i, the teacher with only layer i linear; return means and, where they are known, items.

    Layers below i are the teacher's in every candidate: each of them reads an item once (`LowerStates`).
    """
    states = LowerStates()

    def score(layer: int) -> list[Any]:
        say(f"scoring layer {layer + 1} of {len(twins)}")
        with swapped(teacher, {layer: twins[layer]}), states.below(teacher, layer):
            return [_plain(scorers.recall(teacher)), _plain(scorers.language(teacher))]

    recall_rows, language_rows = zip(*each(len(twins), score), strict=True)
    if any(isinstance(row, float) for row in (*recall_rows, *language_rows)):
        return LayerScores(recall=_means(recall_rows), language=_means(language_rows)), None
    outcomes = Outcomes.of(recall_rows, language_rows)
    return outcomes.scores, outcomes


def _plain(score: float | Sequence[float]) -> float | list[float]:
    """Return a score as JSON takes it."""
    return [float(item) for item in score] if isinstance(score, Sequence) else float(score)


def _means(rows: Iterable[Any]) -> tuple[float, ...]:
    return tuple(row if isinstance(row, float) else sum(row) / len(row) for row in rows)


def select_layers(settings: Conversion, num_layers: int, scores: LayerScores | None) -> tuple[int, ...]:
    """Return the layers that stay attention, ascending. Raises RecipeError for what the model does not have."""
    keep = settings.keep
    if keep.layers is not None:
        if wrong := [layer for layer in keep.layers if layer >= num_layers]:
            raise RecipeError(f"conversion.keep.layers names layer {wrong[0]}; the teacher has 0 to {num_layers - 1}")
        return tuple(sorted(set(keep.layers)))
    amount = 0 if keep.method == "none" else num_kept(keep, num_layers)
    return select(
        num_layers, amount, method=keep.method, scores=scores, epsilon=keep.epsilon, first_last=keep.first_last
    )


def blank_scores(num_layers: int) -> LayerScores:
    return LayerScores(recall=(0.0,) * num_layers, language=(0.0,) * num_layers)


def record_of(
    keep: Keep,
    num_layers: int,
    kept: tuple[int, ...],
    scores: LayerScores | None,
    outcomes: Outcomes | None,
    seed: int,
) -> Selection:
    method = keep.method if keep.layers is None else "layers"
    sure = None
    if outcomes is not None:
        sure = bootstrap(
            outcomes, len(kept), method=method, epsilon=keep.epsilon, first_last=keep.first_last, seed=seed
        )
    return Selection(
        num_layers=num_layers,
        method=method,
        epsilon=keep.epsilon,
        first_last=keep.first_last,
        kept=kept,
        scores=scores,
        importance=() if scores is None else importance(scores, keep.epsilon, method),
        bootstrap=sure,
    )
