"""Which layers stay softmax attention: HALO's score over single-layer swaps, and the rules it is compared with."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sala.errors import InputError, RecipeError, nearest

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


def importance(scores: LayerScores, epsilon: float = DEFAULT_EPSILON) -> tuple[float, ...]:
    """Return HALO's score s_i = (max_j R_j - R_i) / (max_j C_j - C_i + epsilon) for every layer.

    The maxima run over the swapped models, not over the original one: with the original's numbers another set
    is chosen, because some swaps beat it. `epsilon` must not be below the noise of C. Source: HALO eq. 8.
    """
    if not epsilon > 0:
        raise RecipeError(f"epsilon is {epsilon}; it must be above 0")
    best_recall, best_language = max(scores.recall), max(scores.language)
    return tuple(
        (best_recall - recall) / (best_language - language + epsilon)
        for recall, language in zip(scores.recall, scores.language, strict=True)
    )


def ranking(values: Sequence[float]) -> tuple[int, ...]:
    """Return the layers from the highest value to the lowest; of equal values the higher layer first, as published."""
    return tuple(sorted(range(len(values)), key=lambda layer: (values[layer], layer), reverse=True))


def _halo(scores: LayerScores, epsilon: float) -> tuple[int, ...]:
    return ranking(importance(scores, epsilon))


def _recall_drop(scores: LayerScores, epsilon: float) -> tuple[int, ...]:
    return ranking([-recall for recall in scores.recall])


# every rule that needs scores: (scores, epsilon) -> all layers, the one to keep first first
RANKINGS: dict[str, Callable[[LayerScores, float], tuple[int, ...]]] = {"halo": _halo, "recall_drop": _recall_drop}
# rules that need none
UNSCORED = ("uniform", "none")
METHODS = (*RANKINGS, *UNSCORED)


def uniform(num_layers: int, keep: int) -> tuple[int, ...]:
    """Return `keep` layers spread evenly, each at the middle of its share of the stack."""
    return tuple(int((2 * index + 1) * num_layers / (2 * keep)) for index in range(keep))


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
    fixed = tuple(sorted({0, num_layers - 1})) if first_last else ()
    if not max(1, len(fixed)) <= keep <= num_layers:
        at_least = f"{max(1, len(fixed))} (first and last are kept)" if first_last else "1"
        raise RecipeError(f"keep is {keep}; with {num_layers} layers it must be {at_least} to {num_layers}")
    free = keep - len(fixed)
    if method == "uniform":
        inner = [layer for layer in range(num_layers) if layer not in fixed]
        chosen = tuple(inner[index] for index in uniform(len(inner), free)) if free else ()
    else:
        if scores is None:
            raise RecipeError(f"selection method {method!r} needs scores of every layer; none were given")
        if scores.num_layers != num_layers:
            raise RecipeError(f"scores of {scores.num_layers} layers were given for a model of {num_layers}")
        order = [layer for layer in RANKINGS[method](scores, epsilon) if layer not in fixed]
        chosen = tuple(order[:free])
    return tuple(sorted((*fixed, *chosen)))


def read_scores(path: str | Path, model: str) -> LayerScores:
    """Read one model's scores from a JSON table.

    Layout: `{"models": {MODEL: {"layers": [{"layer": i, "commonsense": {"avg": C_i}, "retrieval": {"avg": R_i}}]}}}`.

    Raises:
        InputError: the file is missing or not such a table, or does not hold `model`.
    """
    path = Path(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a JSON table of layer scores is needed") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a JSON table of layer scores: {error}") from None
    models = table.get("models") if isinstance(table, dict) else None
    if not isinstance(models, dict):
        raise InputError(f"{path} has no object 'models'; a table of layer scores maps model names to their layers")
    if model not in models:
        raise InputError(f"{path} has no model {model!r}; it has: {', '.join(models)}{nearest(model, models)}")
    rows = models[model].get("layers") if isinstance(models[model], dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: model {model!r} has no list 'layers'; one row a layer is needed")
    found: dict[int, tuple[float, float]] = {}
    for index, row in enumerate(rows):
        try:
            found[int(row["layer"])] = (float(row["retrieval"]["avg"]), float(row["commonsense"]["avg"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: row {index} of model {model!r} is not {{layer, retrieval.avg, commonsense.avg}} with numbers "
                f"({type(error).__name__}: {error})"
            ) from None
    if sorted(found) != list(range(len(rows))):
        raise InputError(
            f"{path}: the layers of model {model!r} are {sorted(found)}; 0 to {len(rows) - 1} once each are needed"
        )
    return LayerScores(
        recall=tuple(found[layer][0] for layer in range(len(rows))),
        language=tuple(found[layer][1] for layer in range(len(rows))),
    )


def select_from_table(
    path: str | Path,
    model: str,
    keep: int,
    *,
    epsilon: float = DEFAULT_EPSILON,
    method: str = "halo",
    first_last: bool = False,
) -> tuple[int, ...]:
    """Return the kept layers, ascending, for a table as `read_scores` takes it."""
    scores = read_scores(path, model)
    return select(scores.num_layers, keep, method=method, scores=scores, epsilon=epsilon, first_last=first_last)
