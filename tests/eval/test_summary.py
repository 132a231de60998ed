"""Means, intervals and differences."""

from typing import Any

import numpy as np
import pytest

from sala.errors import InputError
from sala.eval import compare
from sala.eval.summary import as_markdown, bootstrap, summarize
from sala.eval.task import Task


def task(name: str, measure: str = "share right") -> Task:
    return Task(name, lambda *_: pytest.fail(), lambda *_: 0.0, "group", measure)


def records(name: str, scores: list[float], **facts: Any) -> list[dict[str, Any]]:
    return [
        {"task": name, "length": 64, "index": i, "prompt": f"p{i}", "tokens": 60, "score": score, **facts}
        for i, score in enumerate(scores)
    ]


def test_the_interval_of_a_mean_is_that_of_its_normal_approximation() -> None:
    scores = np.random.default_rng(0).random(400)
    low, high = bootstrap([scores])
    half = 1.96 * scores.std() / 20
    assert low == pytest.approx(scores.mean() - half, abs=0.004)
    assert high == pytest.approx(scores.mean() + half, abs=0.004)


def test_an_average_weighs_tasks_alike_and_takes_the_weaker_label() -> None:
    rows = summarize(
        [*records("a", [1.0] * 8, label="ruler"), *records("b", [0.0, 1.0], label="ruler-like")],
        {"a": task("a"), "b": task("b")},
    )
    assert (rows[-1].task, rows[-1].score, rows[-1].label) == ("group average of 2", 0.75, "ruler-like")


def test_shares_are_shown_in_percent_and_nats_as_they_are() -> None:
    rows = summarize(
        [*records("a", [0.5, 0.5]), *records("b", [2.5])], {"a": task("a"), "b": task("b", "nats a token")}
    )
    table = as_markdown(rows[:2])
    assert "50.00 [50.00, 50.00]" in table and "2.50 [2.50, 2.50]" in table


def test_a_difference_in_every_pair_is_significant_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(40)
    [better] = compare(records("t", a.tolist()), records("t", (a + 0.1).tolist()))
    assert better.difference == pytest.approx(0.1) and better.p < 0.001 and better.low > 0
    [same] = compare(records("t", a.tolist()), records("t", rng.permutation(a).tolist()))
    assert same.p > 0.05 and same.low < 0 < same.high


def test_only_samples_of_one_prompt_with_a_score_in_both_are_compared() -> None:
    a, b = records("t", [1.0, 1.0, 1.0]), records("t", [0.0, 1.0, 1.0])
    b[1]["prompt"] = "another"
    b[2] = {**b[2], "error": "status 500"}
    [row] = compare(a, b)
    assert (row.pairs, row.difference) == (1, -1.0)
    with pytest.raises(InputError, match="no sample with the same prompt"):
        compare(a, records("u", [1.0]))


@pytest.mark.parametrize(("pairs", "p"), [(1, 1.0), (4, 2 / 16), (5, 2 / 32), (10, 2 / 1024)])
def test_few_pairs_are_exchanged_in_every_way(pairs: int, p: float) -> None:
    [row] = compare(records("t", [0.0] * pairs), records("t", [1.0 + i for i in range(pairs)]))
    assert row.p == pytest.approx(p)
