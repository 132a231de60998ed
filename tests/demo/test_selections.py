"""The table of selection methods is made of what each seed chose and what that choice gave."""

from typing import Any

import pytest

from sala.demo.selections import summarize_selections


def run(seed: int, halo: list[int], other: list[int]) -> dict[str, Any]:
    def result(kept: list[int]) -> dict[str, Any]:
        points = [{"haystack": "text", "length": 512, "questions": 4, "accuracy": 0.2 * kept[0] + 0.1 * seed}]
        return {"kept": kept, "recall": points, "language": [{"text": {"loss": 2.0 + kept[0]}}]}

    rows = [("halo", halo, 100 + seed), ("kl", other, 50)]
    choices = [{"method": name, "kept": kept, "tokens": tokens, "frequency": [1.0, 0.0]} for name, kept, tokens in rows]
    kept = [halo] if halo == other else [halo, other]
    return {"seed": seed, "choices": choices, "results": [result(one) for one in kept]}


def test_a_row_has_the_choices_the_cost_and_what_they_gave() -> None:
    halo, other = summarize_selections([run(0, [1], [0]), run(1, [1], [1])])["rows"]
    assert (halo["method"], halo["kept"], halo["tokens"]) == ("halo", [[1], [1]], round(100.5))
    assert halo["recall"]["mean"] == pytest.approx(0.25) and halo["loss"]["spread"] == 0
    assert (other["kept"], other["tokens"]) == ([[0], [1]], 50)
    assert other["recall"]["mean"] == pytest.approx((0.0 + 0.3) / 2) and other["loss"]["mean"] == 2.5
