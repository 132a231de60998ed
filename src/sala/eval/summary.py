"""From samples to numbers: means with bootstrap intervals, a table, and whether two runs differ."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sala.errors import InputError
from sala.eval.task import Task

DRAWS, SEED = 2000, 0
# pairs of which every exchange is tried
MOST_EXACT = 12
# a group's row: the mean of its tasks' means
AVERAGE = "average"


@dataclass(frozen=True, slots=True)
class Row:
    """One task at one length. score: the mean over samples with one, None without any; low, high: 95 % by bootstrap.

    task: for a group of several, its name and "average". tokens: the mean of prompts' real lengths.
    label: "ruler", or "ruler-like" where any sample's data deviate; empty for tasks that have no such label.
    """

    task: str
    length: int
    samples: int
    errors: int
    score: float | None
    low: float | None
    high: float | None
    measure: str
    tokens: float
    group: str
    label: str = ""


def summarize(records: Sequence[Mapping[str, Any]], tasks: Mapping[str, Task]) -> list[Row]:
    """Return a row a task and length in the order of the records, and the average of every group with several tasks."""
    cells: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["task"], record["length"]), []).append(record)
    rows = [_row(tasks[name], length, own) for (name, length), own in cells.items()]
    groups: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for name, length in cells:
        groups.setdefault((tasks[name].group, length), []).append((name, length))
    for (group, length), members in groups.items():
        if len(members) > 1:
            rows.append(_average(group, length, [cells[member] for member in members], tasks[members[0][0]]))
    return rows


def as_mapping(row: Row) -> dict[str, Any]:
    return asdict(row)


def as_markdown(rows: Sequence[Row]) -> str:
    """Return a table, tasks down and lengths across, with intervals; shares are in percent."""
    lengths = sorted({row.length for row in rows})
    cells = {(row.task, row.length): row for row in rows}
    names = list(dict.fromkeys(row.task for row in rows))
    lines = ["| task | measure | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(lengths))
    for name in names:
        own = [cells.get((name, length)) for length in lengths]
        known = next(row for row in own if row is not None)
        labels = {row.label for row in own if row is not None and row.label}
        shown = f"{name} ({', '.join(sorted(labels))})" if labels and labels != {"ruler"} else name
        lines.append(f"| {shown} | {known.measure} | " + " | ".join(map(_cell, own)) + " |")
    return (
        "\n".join(lines)
        + "\n\nMean and 95 % bootstrap interval over samples; samples with an error are left out and counted.\n"
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    failed = f", {row.errors} of {row.samples} failed" if row.errors else ""
    if row.score is None or row.low is None or row.high is None:
        return "no score" + failed
    scale = 100 if row.measure.startswith("share") else 1
    return f"{scale * row.score:.2f} [{scale * row.low:.2f}, {scale * row.high:.2f}]{failed}"


def _row(task: Task, length: int, records: Sequence[Mapping[str, Any]]) -> Row:
    scores = _scores(records)
    low, high = bootstrap([scores])
    return Row(
        task=task.name,
        length=length,
        samples=len(records),
        errors=len(records) - len(scores),
        score=float(scores.mean()) if len(scores) else None,
        low=low,
        high=high,
        measure=task.measure,
        tokens=_mean_tokens(records),
        group=task.group,
        label=_label(records),
    )


def _average(group: str, length: int, cells: Sequence[Sequence[Mapping[str, Any]]], task: Task) -> Row:
    scores = [_scores(records) for records in cells]
    complete = all(len(own) for own in scores)
    low, high = bootstrap(scores)
    records = [record for own in cells for record in own]
    return Row(
        task=f"{group} {AVERAGE} of {len(cells)}",
        length=length,
        samples=len(records),
        errors=len(records) - sum(map(len, scores)),
        score=float(np.mean([own.mean() for own in scores])) if complete else None,
        low=low,
        high=high,
        measure=task.measure,
        tokens=_mean_tokens(records),
        group=group,
        label=_label(records),
    )


def _mean_tokens(records: Iterable[Mapping[str, Any]]) -> float:
    known = [record["tokens"] for record in records if "tokens" in record]
    return float(np.mean(known)) if known else 0.0


def _label(records: Iterable[Mapping[str, Any]]) -> str:
    labels = {record["label"] for record in records if "label" in record}
    # one deviating sample is enough
    return "ruler-like" if "ruler-like" in labels else ", ".join(sorted(labels))


def _scores(records: Iterable[Mapping[str, Any]]) -> NDArray[np.float64]:
    return np.array([record["score"] for record in records if "error" not in record], np.float64)


def bootstrap(groups: Sequence[NDArray[np.float64]]) -> tuple[float | None, float | None]:
    """Return the 95 % percentile interval of the mean of the groups' means, samples drawn anew within each group."""
    if not all(len(group) for group in groups):
        return None, None
    rng = np.random.default_rng(SEED)
    means = np.mean([group[rng.integers(0, len(group), (DRAWS, len(group)))].mean(axis=1) for group in groups], axis=0)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Difference:
    """Two runs on the same samples of one task and length.

    difference: mean of b minus mean of a; low, high: its 95 % bootstrap interval over pairs. p: how often an
    exchange of the two in random pairs gives a difference as large (two-sided); with five pairs it is never below 0.06.
    """

    task: str
    length: int
    pairs: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float


def compare(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Return a difference for every task and length that both have, over samples with the same prompt and a score in both.

    Raises:
        InputError: there is no such sample.
    """

    def scored(records: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], float]:
        return {
            (record["task"], record["length"], record["index"], record["prompt"]): record["score"]
            for record in records
            if "error" not in record
        }

    left, right = scored(a), scored(b)
    cells: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for key in left:
        if key in right:
            cells.setdefault(key[:2], []).append((left[key], right[key]))
    if not cells:
        raise InputError(
            "the two runs have no sample with the same prompt; expected runs of the same tasks, lengths and seed"
        )
    return [_difference(task, length, np.array(pairs, np.float64)) for (task, length), pairs in cells.items()]


def _difference(task: str, length: int, pairs_P2: NDArray[np.float64]) -> Difference:
    gaps_P = pairs_P2[:, 1] - pairs_P2[:, 0]
    rng = np.random.default_rng(SEED)
    means = gaps_P[rng.integers(0, len(gaps_P), (DRAWS, len(gaps_P)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    if len(gaps_P) <= MOST_EXACT:
        # all exchanges there are, the outcome itself among them
        signs = np.array(list(product((-1.0, 1.0), repeat=len(gaps_P))))
    else:
        signs = np.vstack([np.ones(len(gaps_P)), rng.choice((-1.0, 1.0), (DRAWS, len(gaps_P)))])
    p = np.mean(np.abs((gaps_P * signs).mean(axis=1)) >= abs(gaps_P.mean()) - 1e-12)
    a, b = pairs_P2.mean(axis=0)
    return Difference(task, length, len(gaps_P), float(a), float(b), float(b - a), float(low), float(high), float(p))


def differences_markdown(differences: Sequence[Difference]) -> str:
    lines = [
        "| task | length | pairs | A | B | B - A | 95 % | p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in differences:
        lines.append(
            f"| {row.task} | {row.length:,} | {row.pairs} | {row.a:.4f} | {row.b:.4f} | {row.difference:+.4f} | "
            f"[{row.low:+.4f}, {row.high:+.4f}] | {row.p:.4f} |"
        )
    return "\n".join(lines) + "\n"
