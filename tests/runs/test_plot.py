"""A run's picture shows every stage and every step."""

import dataclasses
from typing import Any

import pytest

from sala.runs.plot import draw
from sala.train.loop import Progress


def stage(index: int, name: str, steps: int, **changes: Any) -> list[dict[str, Any]]:
    rows = [
        Progress(name, n, steps, 2.0 / n, 1e-3, 0.5, 64 * n, 100.0, 1.0, stage_index=index) for n in range(1, steps + 1)
    ]
    return [dataclasses.asdict(row) | changes for row in rows]


def test_each_stage_has_its_loss_and_the_others_run_over_all_tokens() -> None:
    figure = draw([stage(0, "align", 3), stage(1, "long", 5)], "a run")
    align, long, rate, norm, speed = figure.get_axes()
    assert [axes.get_title("left") for axes in (align, long)] == ["align", "long"]
    assert [axes.get_title("left") for axes in (rate, norm, speed)] == ["learning rate", "gradient norm", "tokens/s"]
    assert list(align.lines[0].get_xdata()) == [64, 128, 192]
    assert list(align.lines[0].get_ydata()) == [2.0, 1.0, 2 / 3]
    assert list(long.lines[0].get_xdata()) == [64, 128, 192, 256, 320]
    # the second stage starts where the first one ended, and the place is marked
    second, boundary = rate.lines[1:]
    assert list(second.get_xdata()) == [256, 320, 384, 448, 512]
    assert list(boundary.get_xdata()) == [192, 192]
    assert figure.get_suptitle() == "a run: 512 tokens; long, step 5 of 5"


@pytest.mark.parametrize(("stages", "rows"), [(1, 1), (4, 1), (5, 2), (9, 3)])
def test_many_stages_take_more_rows(stages: int, rows: int) -> None:
    figure = draw([stage(i, f"stage {i}", 2) for i in range(stages)], "a run")
    assert len(figure.get_axes()) == stages + 3
    assert figure.get_axes()[0].get_subplotspec().get_gridspec().nrows == rows


def test_learning_rates_of_different_size_share_a_logarithmic_axis_and_a_warm_up_does_not_make_one() -> None:
    warm_up = stage(0, "one", 3)
    warm_up[0]["learning_rate"] = 1e-9
    assert draw([warm_up], "a run").get_axes()[1].get_yscale() == "linear"
    assert draw([warm_up, stage(1, "two", 3, learning_rate=1e-5)], "a run").get_axes()[2].get_yscale() == "log"


def test_a_stage_of_one_step_is_seen() -> None:
    for axes in draw([stage(0, "one", 1)], "a run").get_axes():
        assert axes.lines[-1].get_marker() == "o"
    for axes in draw([stage(0, "two", 2)], "a run").get_axes():
        assert axes.lines[-1].get_marker() == ""
