"""The learning rate is a pure function of the step."""

import pytest

from sala.recipe.schedule import CURVES, learning_rate


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
def test_every_curve_starts_at_its_peak_and_ends_at_its_final(curve: str, warmup_steps: int) -> None:
    rates = [
        learning_rate(step, 40, peak=1.0, final=0.01, warmup_steps=warmup_steps, curve=curve) for step in range(40)
    ]
    assert rates[:warmup_steps] == pytest.approx([(step + 1) / warmup_steps for step in range(warmup_steps)])
    assert rates[warmup_steps] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1.0 if curve == "constant" else 0.01)
    assert all(before >= after for before, after in zip(rates[warmup_steps:], rates[warmup_steps + 1 :], strict=False))


def test_wsd_stays_before_it_decays() -> None:
    rates = [learning_rate(step, 101, peak=1.0, final=0.1, warmup_steps=0, curve="wsd") for step in range(101)]
    assert rates[:91] == pytest.approx([1.0] * 91)
    assert rates[95] == pytest.approx(0.55)


def test_exponential_has_a_constant_ratio() -> None:
    rates = [learning_rate(step, 5, peak=1.0, final=1 / 16, warmup_steps=0, curve="exponential") for step in range(5)]
    assert rates == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16])


def test_a_stage_of_one_step_has_its_peak() -> None:
    assert learning_rate(0, 1, peak=1.0, final=0.1, warmup_steps=0, curve="cosine") == 1.0
