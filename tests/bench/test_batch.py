"""A step of many rows is measured whole and in its parts, and continuations hold their prefix once."""

import pytest

from sala.bench import BatchPlan, run_batch
from sala.errors import InputError


def test_a_step_and_its_parts_are_measured() -> None:
    kept = []
    results = run_batch(BatchPlan("sala-10m", (100, 700), 4, 1024, repeats=1), keep=kept.append)
    assert not results["failures"] and len(kept) == 2
    ragged, shared = results["ragged"], results["shared"]
    assert [row["length"] for row in ragged["rows"]] == [100, 700]
    parts = ragged["products_s"] + sum(row["attention_s"] for row in ragged["rows"])
    assert ragged["times_its_parts"] == pytest.approx(ragged["step_s"] / parts)
    # four pages in common and one each, of five each
    assert shared["pages_bytes_unshared"] == shared["pages_bytes"] // 8 * 20


@pytest.mark.parametrize("change", [{"lengths": (0,)}, {"repeats": 0}, {"clock": "sundial"}, {"continuations": 0}])
def test_what_cannot_be_measured_is_refused(change: dict) -> None:
    with pytest.raises(InputError, match="numbers below one, or no clock of wall, cpu"):
        run_batch(BatchPlan("sala-10m", **change))
