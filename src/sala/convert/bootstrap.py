"""How far a choice of layers hangs on which questions were asked: the items of its scores, drawn again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sala.convert.select import DEFAULT_EPSILON, Floats, LayerScores, fixed_layers, shares, values_of
from sala.errors import InputError

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What every swapped model M_i made of every item: `recall` (L, questions), `language` (L, pieces of text), float64.

    Item n is the same for all layers, so that layers are compared on the same luck. A score is the mean of its row.
    """

    recall: Floats
    language: Floats

    @classmethod
    def of(cls, recall: Sequence[Sequence[float]], language: Sequence[Sequence[float]]) -> "Outcomes":
        """Make the tables from a row a layer.

        Raises:
            InputError: a layer was given other items than the first one, or fewer than two.
        """
        tables = {}
        for name, rows in (("recall", recall), ("language", language)):
            sizes = [len(row) for row in rows]
            if wrong := [layer for layer, size in enumerate(sizes) if size != sizes[0]]:
                raise InputError(
                    f"the {name} scores of layer 0 have {sizes[0]} items, those of layer {wrong[0]} have "
                    f"{sizes[wrong[0]]}; every layer needs the same ones"
                )
            if sizes[0] < 2:
                raise InputError(f"the {name} scores have {sizes[0]} items; expected 2 or more")
            tables[name] = np.asarray(rows, np.float64)
        return cls(**tables)

    @property
    def scores(self) -> LayerScores:
        return LayerScores(*(tuple(table.mean(axis=1).tolist()) for table in (self.recall, self.language)))


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """What a choice would have been on other items of the same kind, from resamples of those there are.

    recall_errors, language_errors: the standard error of every layer's R_i and C_i.
    language_noise: the standard error of max_j C_j - C_i, what epsilon is added to; the median over the layers.
    frequency: for every layer, the share of resamples in which it is among the kept ones. Where equal layers leave it open
        which of them are kept, each counts for its share.
    """

    resamples: int
    questions: int
    pieces: int
    recall_errors: tuple[float, ...]
    language_errors: tuple[float, ...]
    language_noise: float
    frequency: tuple[float, ...]


def bootstrap(
    outcomes: Outcomes,
    keep: int,
    *,
    method: str = "halo",
    epsilon: float = DEFAULT_EPSILON,
    first_last: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Bootstrap:
    """Choose `keep` layers again on items drawn with replacement, the same ones for all layers.

    Args:
        method: a rule that needs scores, "halo" or "recall_drop"; epsilon, first_last: as in `select`.

    Questions of one document are drawn one by one, as if they were independent. Source: B. Efron, "Bootstrap Methods:
    Another Look at the Jackknife" (1979).
    """
    rng = np.random.default_rng(seed)
    recall_NL, language_NL = (_means(table, resamples, rng) for table in (outcomes.recall, outcomes.language))
    num_layers = len(outcomes.recall)
    values_NL = values_of(recall_NL, language_NL, epsilon, method)
    shares_NL = shares(values_NL, keep, fixed_layers(num_layers, first_last))
    lead_NL = language_NL.max(axis=1, keepdims=True) - language_NL
    return Bootstrap(
        resamples=resamples,
        questions=outcomes.recall.shape[1],
        pieces=outcomes.language.shape[1],
        recall_errors=tuple(recall_NL.std(axis=0).tolist()),
        language_errors=tuple(language_NL.std(axis=0).tolist()),
        language_noise=float(np.median(lead_NL.std(axis=0))),
        frequency=tuple(shares_NL.mean(axis=0).tolist()),
    )


def _means(table: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return every layer's mean (resamples, L) over items drawn with replacement."""
    items = table.shape[1]
    times_NI = rng.multinomial(items, np.full(items, 1 / items), size=resamples)
    return times_NI @ table.T / items
