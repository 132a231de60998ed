"""The controls: the same long stage as the conversion's, rotations that are stretched, and runs that are kept."""

import json
from pathlib import Path

import pytest
from small_plan import PLAN

from sala.demo.controls import CONTROLS, LONGEST, control_recipe, controls_table, larger_base, run_controls, yarn
from sala.errors import InputError
from sala.model.families import load_config
from sala.model.rope import inverse_frequencies, trained_length
from sala.recipe import load_recipe


def test_a_control_trains_on_the_stage_that_the_conversion_ends_with() -> None:
    conversion, control = load_recipe("demo"), control_recipe("demo", seed=1)
    [stage], last = control.stages, conversion.stages[-1]
    same = ("loss", "length", "batch", "steps", "learning_rate", "data")
    assert [getattr(stage, name) for name in same] == [getattr(last, name) for name in same]
    assert control.optimizer == conversion.optimizer and control.seed == 1
    assert not stage.sparse and last.sparse


def test_both_ways_slow_the_slowest_rotation_by_the_stretch_and_leave_the_fastest() -> None:
    config = load_config("embedded-teacher")
    before, _ = inverse_frequencies(config, config.head_dim)
    for change in (yarn, larger_base):
        stretched = load_config("embedded-teacher", **change(config))
        after, _ = inverse_frequencies(stretched, config.head_dim)
        assert after[0] == pytest.approx(before[0], rel=1e-6)
        assert before[-1] / after[-1] == pytest.approx(LONGEST / config.max_position_embeddings, rel=1e-3)
        assert trained_length(stretched) == LONGEST


def test_a_second_start_measures_what_is_missing_alone(tmp_path: Path) -> None:
    lines: list[str] = []

    def run(*only: str) -> dict:
        out = tmp_path / "controls.json"
        summary = run_controls(tmp_path / "work", out, recipe="smoke", only=only, plan=PLAN, say=lines.append)
        assert json.loads(out.read_text()) == json.loads(json.dumps(summary))
        return summary

    run("teacher")
    summary = run("teacher", "long-yarn-0")
    assert "teacher: measured before" in lines and list(summary["runs"]) == ["teacher", "long-yarn-0"]
    assert summary["runs"]["long-yarn-0"]["rope_scaling"]["rope_type"] == "yarn"
    assert summary["runs"]["long-yarn-0"]["language"] != summary["runs"]["teacher"]["language"]
    assert "| long-yarn-0, noise |" in controls_table(summary)


def test_an_unknown_control_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"expected one of {next(iter(CONTROLS))}"):
        run_controls(tmp_path, tmp_path / "x.json", only=["yarn"])
