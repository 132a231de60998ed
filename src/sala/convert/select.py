"""Which layers stay softmax attention: HALO's score over single-layer swaps, and the rules it is compared with."""

import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sala.errors import InputError, RecipeError, nearest

Floats = NDArray[np.float64]
DEFAULT_EPSILON = 1e-3


@dataclass(frozen=True, slots=True)
class LayerScores:
    """What each swapped model M_i (only layer i linear) still can do; index = layer.

    `recall` is R_i (retrieval) and `language` is C_i (short-text ability); in both higher is better.
    """

    recall: tuple[float, ...]
    language: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.recall) != len(self.language):
            raise InputError(
                f"{len(self.recall)} recall scores but {len(self.language)} language scores; each layer needs both"
            )
        for name, values in (("recall", self.recall), ("language", self.language)):
            for layer, value in enumerate(values):
                if not math.isfinite(value):
                    raise InputError(f"the {name} score of layer {layer} is {value}; a finite number is needed")

    @property
    def num_layers(self) -> int:
        return len(self.recall)


# every rule that needs scores: (R (..., L), C (..., L), epsilon) -> how much each layer is worth as attention (..., L)
Rule = Callable[[Floats, Floats, float], Floats]


def _halo(recall_L: Floats, language_L: Floats, epsilon: float) -> Floats:
    return _recall_drop(recall_L, language_L, epsilon) / (language_L.max(axis=-1, keepdims=True) - language_L + epsilon)


def _recall_drop(recall_L: Floats, language_L: Floats, epsilon: float) -> Floats:
    return recall_L.max(axis=-1, keepdims=True) - recall_L


RULES: dict[str, Rule] = {"halo": _halo, "recall_drop": _recall_drop}
# rules that need none
UNSCORED = ("uniform", "none")
METHODS = (*RULES, *UNSCORED)


def importance(scores: LayerScores, epsilon: float = DEFAULT_EPSILON, method: str = "halo") -> tuple[float, ...]:
    """Return what every layer is worth as attention, by HALO's score or by the recall lost alone ("recall_drop").

    HALO's is s_i = (max_j R_j - R_i) / (max_j C_j - C_i + epsilon). The maxima run over the swapped models, not over the
    original one: with the original's numbers another set is chosen, because some swaps beat it. `epsilon` must not be
    below the noise of what it is added to (`Bootstrap.language_noise`): the layer whose C happens to be the highest has
    no denominator but epsilon. Source: HALO eq. 8.
    """
    return tuple(values_of(np.asarray(scores.recall), np.asarray(scores.language), epsilon, method).tolist())


def values_of(recall_L: Floats, language_L: Floats, epsilon: float, method: str) -> Floats:
    """Return `importance` for any number of score tables at once, (..., L)."""
    if not 0 < epsilon < math.inf:
        raise RecipeError(f"epsilon is {epsilon}; it must be a number above 0")
    return RULES[method](recall_L, language_L, epsilon)


def ranking(values_L: Floats | Sequence[float]) -> NDArray[np.int64]:
    """Return the layers (..., L) from the highest value to the lowest; of equal ones the higher layer first, as published."""
    values_L = np.asarray(values_L)
    backwards = np.argsort(-values_L[..., ::-1], axis=-1, kind="stable")
    return values_L.shape[-1] - 1 - backwards


def best(values_L: Floats, keep: int, fixed: Sequence[int] = ()) -> NDArray[np.int64]:
    """Return the `keep` layers (..., keep) to keep: those in `fixed`, then those with the highest values."""
    values_L = values_L.copy()
    values_L[..., list(fixed)] = np.inf
    return ranking(values_L)[..., :keep]


def shares(values_L: Floats, keep: int, fixed: Sequence[int] = ()) -> Floats:
    """Return how much of each layer `best` may keep (..., L): 1, 0, or an equal share of what equal layers leave open."""
    values_L = values_L.copy()
    values_L[..., list(fixed)] = np.inf
    last = np.sort(values_L, axis=-1)[..., -keep, None]
    above, equal = values_L > last, values_L == last
    left = keep - above.sum(axis=-1, keepdims=True)
    return above + equal * (left / equal.sum(axis=-1, keepdims=True))


def uniform(num_layers: int, keep: int) -> tuple[int, ...]:
    """Return `keep` layers spread evenly, each at the middle of its share of the stack."""
    return tuple(int((2 * index + 1) * num_layers / (2 * keep)) for index in range(keep))


def fixed_layers(num_layers: int, first_last: bool) -> tuple[int, ...]:
    """Return the layers that stay whatever their score."""
    return tuple(sorted({0, num_layers - 1})) if first_last else ()


def select(
    num_layers: int,
    keep: int,
    *,
    method: str = "halo",
    scores: LayerScores | None = None,
    epsilon: float = DEFAULT_EPSILON,
    first_last: bool = False,
) -> tuple[int, ...]:
    """Return the layers that stay attention, ascending.

    Args:
        keep: how many stay, the first and the last included when `first_last` is set (MiniCPM-SALA keeps both
            without scoring them, for stability).
        method: "halo" and "recall_drop" rank by `scores`; "uniform" spreads; "none" makes every layer linear.

    Raises:
        RecipeError: an unknown method, `keep` out of range, or scores missing.
    """
    if method not in METHODS:
        raise RecipeError(
            f"selection method {method!r} is not known; known: {', '.join(METHODS)}{nearest(method, METHODS)}"
        )
    if method == "none":
        return ()
    fixed = fixed_layers(num_layers, first_last)
    if not max(1, len(fixed)) <= keep <= num_layers:
        at_least = f"{max(1, len(fixed))} (first and last are kept)" if first_last else "1"
        raise RecipeError(f"keep is {keep}; with {num_layers} layers it must be {at_least} to {num_layers}")
    if method == "uniform":
        inner = [layer for layer in range(num_layers) if layer not in fixed]
        free = keep - len(fixed)
        return tuple(sorted((*fixed, *(inner[index] for index in uniform(len(inner), free)))))
    if scores is None:
        raise RecipeError(f"selection method {method!r} needs scores of every layer; none were given")
    if scores.num_layers != num_layers:
        raise RecipeError(f"scores of {scores.num_layers} layers were given for a model of {num_layers}")
    return tuple(sorted(best(np.asarray(importance(scores, epsilon, method)), keep, fixed).tolist()))


def read_scores(path: str | Path, model: str | None = None) -> LayerScores:
    """Read one model's scores from a JSON table, or those that a conversion wrote as `selection.json`.

    Layouts: `{"models": {MODEL: {"layers": [{"layer": i, "commonsense": {"avg": C_i}, "retrieval": {"avg": R_i}}]}}}`, and
    `{"layers": [{"layer": i, "recall": R_i, "language": C_i}]}`, which has one model and takes no name.

    Raises:
        InputError: the file is missing or not such a table, or does not hold `model`.
    """
    path = Path(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a JSON table of layer scores is needed") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON table of layer scores: {error}") from None
    if isinstance(table, dict) and "layers" in table:
        if model is not None:
            raise InputError(f"{path} has the scores of one conversion and no names; model {model!r} must be left out")
        return _scores_of(table, str(path), recall=("recall",), language=("language",))
    models = table.get("models") if isinstance(table, dict) else None
    if not isinstance(models, dict):
        raise InputError(f"{path} has no object 'models'; a table of layer scores maps model names to their layers")
    if model not in models:
        wanted = "needs a model's name" if model is None else f"has no model {model!r}"
        raise InputError(f"{path} {wanted}; it has: {', '.join(models)}{nearest(model or '', models)}")
    rows = models[model] if isinstance(models[model], dict) else {}
    return _scores_of(rows, f"{path}: model {model!r}", recall=("retrieval", "avg"), language=("commonsense", "avg"))


def _scores_of(table: Any, where: str, *, recall: Sequence[str], language: Sequence[str]) -> LayerScores:
    """Read the rows of `table["layers"]`; the scores are where the keys lead, one after the other."""
    rows = table.get("layers")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{where} has no list 'layers'; one row a layer is needed")
    found: dict[int, list[float]] = {}
    for index, row in enumerate(rows):
        try:
            found[operator.index(row["layer"])] = [
                float(reduce(lambda value, key: value[key], keys, row)) for keys in (recall, language)
            ]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{where}: row {index} is not {{layer, {'.'.join(recall)}, {'.'.join(language)}}} with numbers "
                f"({type(error).__name__}: {error})"
            ) from None
    if sorted(found) != list(range(len(rows))):
        raise InputError(f"{where}: the layers are {sorted(found)}; 0 to {len(rows) - 1} once each are needed")
    return LayerScores(*(tuple(found[layer][which] for layer in range(len(rows))) for which in (0, 1)))
