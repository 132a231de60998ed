"""Wilson's interval against its published values and limits."""

import pytest

from sala.eval import wilson_interval


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 256), (256, 256), (13, 64)])
def test_the_interval_holds_the_share_and_stays_within_zero_and_one(correct: int, total: int) -> None:
    low, high = wilson_interval(correct, total)
    assert 0.0 <= low <= correct / total <= high <= 1.0
    assert low < high


def test_the_interval_of_81_of_263_is_the_published_one() -> None:
    # R. G. Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_more_questions_narrow_it() -> None:
    few, many = wilson_interval(60, 64), wilson_interval(240, 256)
    assert many[1] - many[0] < few[1] - few[0]
