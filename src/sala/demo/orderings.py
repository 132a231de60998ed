"""HALO's orderings at small scale: which variant of a conversion beats which, over three seeds, from one command.

`python -m sala.demo.orderings --work FOLDER --out FILE`; interrupted, the same command goes on.
Source: HALO (arXiv 2601.22156), Tables 3, 4, 9 and figure 8. The orderings are asked for, not the paper's values.
"""

import argparse
import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev, variance
from typing import Any, Literal

import torch

from sala.bench import environment
from sala.demo.measure import HYBRID_FULL, TEACHER
from sala.demo.plan import Amount, Plan
from sala.demo.trials import (
    SEEDS,
    Change,
    Trial,
    Values,
    all_linear,
    full_attention,
    keep_rope,
    log_moment,
    run_trials,
    summarize,
    unchanged,
    uniform,
    without_alignment,
)
from sala.errors import require_writable
from sala.model.kinds import LIGHTNING
from sala.model.mixers import reconfigured

logger = logging.getLogger("sala.demo.orderings")

Run = Mapping[str, Any]

# windows of the recipe's stages: what lies above the longest is beyond the training length
TRAINED = (512, 2048)
LENGTHS = (*TRAINED, 4096, 8192)
QUESTIONS = 128
CONSTANT = 1.5
CONSTANT_SCALE, NO_SCALE = f"hybrid, logits times {CONSTANT}", "hybrid, no logit scale"
ALIGNMENT_FACTOR = 4
# what counts as the same: recall as a share of the questions, loss as a share of itself
ALIKE_RECALL, ALIKE_LOSS = 0.05, 0.02


def orderings_plan(questions: int = QUESTIONS, lengths: Sequence[int] = LENGTHS) -> Plan:
    """Return the plan of every run; the teacher, slow and lost at the longest, is asked less there."""
    amounts = {
        length: Amount(min(questions, 32 if length > max(TRAINED) else questions), questions) for length in lengths
    }
    return Plan(recipe="orderings", questions=amounts, repeats={}, needle_length=0)


def _lightning_without_rope(values: Values) -> None:
    values["conversion"]["lightning_rope"] = False


def _late_half(values: Values) -> None:
    # spread evenly over layers 2 and 3 of four, one is the last
    values["conversion"]["keep"] = {"layers": [3]}


def _more_alignment(values: Values) -> None:
    for stage in values["stages"]:
        if stage["loss"] == "align":
            stage["steps"] *= ALIGNMENT_FACTOR


@torch.no_grad()
def with_constant_scale(model: Any, factor: float) -> Any:
    """Return a copy of `model` whose attention logits are `factor` times as large at every position."""
    scaled = copy.deepcopy(reconfigured(model, attn_logits_scaling=None))
    for layer, kind in zip(scaled.model.layers, scaled.config.mixer_types, strict=True):
        if kind != LIGHTNING:
            mixer = layer.self_attn
            # logits are linear in the queries, and those in the last weights before them
            last = mixer.q_proj if mixer.q_norm is None else mixer.q_norm
            for parameter in last.parameters():
                parameter.mul_(factor)
    return scaled


def by_scale(hybrid: Any) -> dict[str, Any]:
    """Return the hybrid as it is, with a constant logit scale, and with none: one set of weights, as HALO compares them."""
    full = full_attention(hybrid)[HYBRID_FULL]
    return {
        HYBRID_FULL: full,
        CONSTANT_SCALE: with_constant_scale(full, CONSTANT),
        NO_SCALE: reconfigured(full, attn_logits_scaling=None),
    }


VARIANTS: dict[str, tuple[str, Change]] = {
    "base": ("the recipe as it is", unchanged),
    "lightning-without-rope": ("no rotary positions on linear layers", _lightning_without_rope),
    "rope-kept": ("rotary positions stay on the kept layer", keep_rope),
    "uniform": ("the kept layer in the middle of the stack instead of chosen", uniform),
    "late-half": ("the kept layer in the middle of the later half", _late_half),
    "all-linear": ("no layer stays attention", all_linear),
    "more-alignment": (f"{ALIGNMENT_FACTOR} times the steps of alignment", _more_alignment),
    "without-alignment": ("layers scored and distilled with copied weights", without_alignment),
}
# seed by seed, so that a run that is cut short has every variant
TRIALS = {
    f"{name}-{seed}": Trial(about, change, seed=seed, views=by_scale if name == "base" else full_attention)
    for seed in SEEDS
    for name, (about, change) in VARIANTS.items()
}


@dataclass(frozen=True, slots=True)
class Who:
    """One side of a claim: a variant, and under which name its model was measured."""

    variant: str
    model: str = HYBRID_FULL


@dataclass(frozen=True, slots=True)
class Claim:
    """One side of the figures is above the other ("above"), not below it ("not below"), or the same ("alike").

    where: at lengths that were trained on, beyond them, or both ("everywhere"); without meaning for loss.
    """

    ordering: int
    says: str
    upper: Who
    lower: Who
    relation: Literal["above", "not below", "alike"] = "above"
    where: Literal["trained", "beyond", "everywhere"] = "everywhere"
    figure: Literal["recall", "loss"] = "recall"


BASE = Who("base")
CLAIMS = (
    Claim(1, "rotary positions on linear layers help recall", BASE, Who("lightning-without-rope")),
    Claim(1, "and prediction of text", Who("lightning-without-rope"), BASE, figure="loss"),
    Claim(
        2,
        "rotary positions on the kept layer do no harm where it was trained",
        BASE,
        Who("rope-kept"),
        "alike",
        "trained",
    ),
    Claim(2, "and collapse beyond", BASE, Who("rope-kept"), where="beyond"),
    Claim(3, "log_a(t + a) is no worse than a constant", BASE, Who("base", CONSTANT_SCALE), "not below", "beyond"),
    Claim(3, "a constant is better than no scale", Who("base", CONSTANT_SCALE), Who("base", NO_SCALE), where="beyond"),
    Claim(3, "log_a(t + a) is better than no scale", BASE, Who("base", NO_SCALE), where="beyond"),
    Claim(4, "HALO's selection is no worse than uniform", BASE, Who("uniform"), "not below"),
    Claim(4, "HALO's selection is better than the later half", BASE, Who("late-half")),
    Claim(4, "uniform is better than the later half", Who("uniform"), Who("late-half")),
    Claim(5, "all linear predicts short text as well", Who("all-linear"), BASE, "alike", figure="loss"),
    Claim(5, "all linear recalls much less beyond", BASE, Who("all-linear"), where="beyond"),
    Claim(6, "more alignment does not help recall", BASE, Who("more-alignment"), "not below"),
    Claim(6, "nor prediction of text", Who("more-alignment"), BASE, "not below", figure="loss"),
    Claim(6, "some alignment is better than none for recall", BASE, Who("without-alignment")),
    Claim(6, "and for prediction of text", Who("without-alignment"), BASE, figure="loss"),
)
# of a measured point, what is kept in the summary
POINT = ("model", "haystack", "length", "questions", "accuracy")
HOLDS, NOISE, FAILS = "holds", "within noise", "does not hold"


def summarize_orderings(runs: Sequence[Run]) -> dict[str, Any]:
    """Return every claim with its figures and verdict, the mean and spread of every variant, and the runs themselves."""
    compared = [row for claim in CLAIMS for row in _compare(claim, runs)]
    return {
        "environment": environment(),
        "rule": "noise is twice the standard error of the difference, over seeds or over questions, whichever is larger; "
        f"alike is within {ALIKE_RECALL} of recall or {ALIKE_LOSS:.0%} of the loss",
        "orderings": _verdicts(compared),
        "cache": _cache(runs),
        "comparisons": compared,
        "variants": _variants(runs),
        "runs": {name: run | {"points": _points(run)} for name, run in summarize(runs)["runs"].items()},
    }


def _points(run: Run) -> list[dict[str, Any]]:
    return [{field: point[field] for field in POINT} for point in run["points"]]


def _variant(run: Run) -> str:
    return str(run["name"]).rpartition("-")[0]


def _values(runs: Sequence[Run], who: Who, haystack: str | None, length: int) -> dict[int, float]:
    """Return seed -> recall in a haystack at a length, or loss where there is no haystack."""
    found: dict[int, float] = {}
    for run in runs:
        if _variant(run) != who.variant:
            continue
        seed = run["recipe"]["seed"]
        if haystack is None:
            values = [row["text"]["loss"] for row in run["language"] if row["model"] == who.model]
        else:
            wanted = (who.model, haystack, length)
            points = run["retrieval"]
            values = [p["accuracy"] for p in points if (p["model"], p["haystack"], p["length"]) == wanted]
        if values:
            found[seed] = values[0]
    return found


def _places(claim: Claim, runs: Sequence[Run]) -> list[tuple[str | None, int]]:
    """Return the (haystack, length) that a claim speaks of; a loss has no haystack, and the one length it was measured at."""
    if claim.figure == "loss":
        return [(None, length) for length in dict.fromkeys(row["length"] for run in runs for row in run["language"])]
    points = [point for run in runs for point in run["retrieval"]]
    places = dict.fromkeys((point["haystack"], point["length"]) for point in points)
    wanted = {"trained": (True,), "beyond": (False,), "everywhere": (True, False)}[claim.where]
    return [(haystack, length) for haystack, length in places if (length <= max(TRAINED)) in wanted]


def _compare(claim: Claim, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row a place where both sides have at least two seeds."""
    questions = {
        (p["haystack"], p["length"]): p["questions"] for run in runs for p in run["retrieval"] if p["model"] != TEACHER
    }
    rows = []
    for haystack, length in _places(claim, runs):
        upper, lower = (_values(runs, who, haystack, length) for who in (claim.upper, claim.lower))
        if min(len(upper), len(lower)) < 2:
            continue
        difference = mean(upper.values()) - mean(lower.values())
        asked = None if haystack is None else questions[haystack, length]
        noise = 2 * sqrt(sum(_error(list(side.values()), asked) ** 2 for side in (upper, lower)))
        alike = ALIKE_RECALL if haystack is not None else ALIKE_LOSS * mean(lower.values())
        rows.append(
            {
                "ordering": claim.ordering,
                "says": claim.says,
                "relation": claim.relation,
                "figure": claim.figure,
                "haystack": haystack,
                "length": length,
                "upper": _side(claim.upper, upper),
                "lower": _side(claim.lower, lower),
                "difference": difference,
                "noise": noise,
                "verdict": verdict(claim.relation, difference, noise, alike),
            }
        )
    return rows


def _error(values: Sequence[float], questions: int | None) -> float:
    """Return the standard error of a mean over seeds: from their spread, or that of shares of so many questions."""
    over_seeds = variance(values) / len(values)
    share = mean(values)
    over_questions = 0.0 if questions is None else share * (1 - share) / (questions * len(values))
    return sqrt(max(over_seeds, over_questions))


def _side(who: Who, values: Mapping[int, float]) -> dict[str, Any]:
    figures = [values[seed] for seed in sorted(values)]
    return {
        "variant": who.variant,
        "model": who.model,
        "mean": mean(figures),
        "spread": stdev(figures),
        "values": figures,
    }


def verdict(relation: str, difference: float, noise: float, alike: float) -> str:
    """Return whether a difference (upper - lower) is what `relation` says, against its noise."""
    if relation == "alike":
        if abs(difference) <= alike:
            return HOLDS
        return NOISE if abs(difference) <= alike + noise else FAILS
    if difference < -noise:
        return FAILS
    return HOLDS if difference > noise or relation == "not below" else NOISE


def _verdicts(compared: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a claim: how many of its comparisons hold, are within noise, do not hold."""
    rows = []
    for ordering, says in dict.fromkeys((row["ordering"], row["says"]) for row in compared):
        verdicts = [row["verdict"] for row in compared if (row["ordering"], row["says"]) == (ordering, says)]
        rows.append(
            {"ordering": ordering, "says": says} | {name: verdicts.count(name) for name in (HOLDS, NOISE, FAILS)}
        )
    return rows


def _cache(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return ordering 7: what a token adds to the hybrid's cache over what it adds to the teacher's, and k / L."""
    for run in runs:
        rows = {row["model"]: row for row in run["cache"]}
        if TEACHER in rows and HYBRID_FULL in rows:
            kept = len(run["conversion"]["kept"])
            ratio = rows[HYBRID_FULL]["bytes_a_token"] / rows[TEACHER]["bytes_a_token"]
            expected = kept / len(run["hybrid"]["mixer_types"])
            return {
                "ordering": 7,
                "says": "a token adds k / L of the teacher's cache, and states do not grow",
                "rows": [rows[TEACHER], rows[HYBRID_FULL]],
                "ratio": ratio,
                "expected": expected,
                "verdict": HOLDS if ratio == expected else FAILS,
            }
    return None


def _variants(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return mean and spread over seeds of every variant's recall and loss."""
    models = dict.fromkeys((_variant(run), row["model"]) for run in runs for row in run["language"])
    points = [point for run in runs for point in run["retrieval"]]
    places = [*dict.fromkeys((p["haystack"], p["length"]) for p in points)]
    rows = []
    for variant, model in models:
        for haystack, length in [*places, (None, min(length for _, length in places))]:
            values = list(_values(runs, Who(variant, model), haystack, length).values())
            if values:
                rows.append(
                    {
                        "variant": variant,
                        "model": model,
                        "figure": "loss" if haystack is None else "recall",
                        "haystack": haystack,
                        "length": length,
                        "mean": mean(values),
                        "spread": stdev(values) if len(values) > 1 else None,
                        "seeds": len(values),
                    }
                )
    return rows


def orderings_table(summary: Mapping[str, Any]) -> str:
    """Return the summary as Markdown: the claims, then every variant's mean and spread."""
    lines = [f"| | claim | {HOLDS} | {NOISE} | {FAILS} |", "|---" * 5 + "|"]
    lines += [
        f"| {row['ordering']} | {row['says']} | {row[HOLDS]} | {row[NOISE]} | {row[FAILS]} |"
        for row in summary["orderings"]
    ]
    if cache := summary["cache"]:
        lines.append(
            f"| 7 | {cache['says']}: {cache['ratio']:.3f} for {cache['expected']:.3f} | {cache['verdict']} | | |"
        )
    variants = summary["variants"]
    columns = dict.fromkeys((row["haystack"], row["length"]) for row in variants)
    names = [f"{haystack} {length:,}" if haystack else f"loss at {length:,}" for haystack, length in columns]
    lines += ["", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for variant, model in dict.fromkeys((row["variant"], row["model"]) for row in variants):
        cells = []
        for place in columns:
            row = next(
                (
                    r
                    for r in variants
                    if (r["variant"], r["model"], (r["haystack"], r["length"])) == (variant, model, place)
                ),
                None,
            )
            spread = "" if row is None or row["spread"] is None else f" ± {row['spread']:.2f}"
            cells.append("" if row is None else f"{row['mean']:.2f}{spread}")
        lines.append(f"| {variant}: {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/orderings"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/orderings.json"), help="the summary")
    parser.add_argument("--only", nargs="*", default=[], help=f"of: {', '.join(TRIALS)}")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="a point")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    require_writable(arguments.out)
    summary = run_trials(
        arguments.work,
        arguments.out,
        only=arguments.only,
        plan=orderings_plan(arguments.questions),
        trials=TRIALS,
        summary_of=summarize_orderings,
        observer=log_moment,
        say=logger.info,
    )
    print(orderings_table(summary))


if __name__ == "__main__":
    main()
