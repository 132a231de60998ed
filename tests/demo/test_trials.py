"""The experiment with its seeds and ablations: resumable, and summarised without loss."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_plan import PLAN

from sala.demo.measure import HYBRID_FULL, HYBRID_SPARSE, TEACHER
from sala.demo.trials import TRIALS, run_trials, summarize, summary_table, trial_recipe
from sala.errors import InputError


def test_a_run_that_is_done_is_not_run_again(tmp_path: Path, teacher: Path, few_documents: None) -> None:
    work, out = tmp_path / "work", tmp_path / "results" / "retrieval.json"
    settings: dict[str, Any] = {"teacher": str(teacher), "plan": PLAN}
    summary = run_trials(work, out, only=["all-linear"], **settings)
    assert json.loads(out.read_text()) == json.loads(json.dumps(summary))
    assert summary["runs"]["all-linear"]["kept"] == []
    written = (work / "all-linear.json").stat().st_mtime_ns
    said: list[str] = []
    assert run_trials(work, out, only=["all-linear"], say=said.append, **settings)["runs"] == summary["runs"]
    assert said == ["all-linear: done before"]
    assert (work / "all-linear.json").stat().st_mtime_ns == written
    with pytest.raises(InputError, match="another plan"):
        run_trials(work, out, only=["all-linear"], teacher=str(teacher), plan=replace(PLAN, needles=1))


@pytest.mark.parametrize("name", TRIALS)
def test_every_trial_is_a_valid_recipe(name: str) -> None:
    plain, changed = trial_recipe(TRIALS["seed-0"], "demo"), trial_recipe(TRIALS[name], "demo")
    assert changed.seed == TRIALS[name].seed
    if name not in ("seed-0", "second-teacher"):
        assert changed != plain


def test_an_unknown_trial_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'rope-kept'"):
        run_trials(tmp_path, tmp_path / "out.json", only=["rope-keep"])


def run_with(name: str, accuracy: float, unread: float) -> dict[str, Any]:
    models = {TEACHER: 0.5, HYBRID_FULL: accuracy, HYBRID_SPARSE: accuracy}
    points = [
        {
            "model": model,
            "haystack": haystack,
            "length": length,
            "questions": 256,
            "accuracy": 1.0 if length == 512 else value,
            "unread_share": unread if model == HYBRID_SPARSE else None,
            "depths": [],
        }
        for model, value in models.items()
        for haystack in ("text", "noise")
        for length in (512, 16384)
    ]
    return {
        "name": name,
        "about": "",
        "conversion": {"kept": [1]},
        "recipe": {"seed": 0},
        "teacher": {"name": "teacher"},
        "seconds": {},
        "environment": {"commit": None, "hardware": {}, "command": ""},
        "retrieval": points,
        "language": [],
    }


def test_the_summary_has_mean_and_spread_over_seeds_and_compares_with_the_bars() -> None:
    summary = summarize([run_with("seed-0", 0.9, 0.8), run_with("seed-1", 1.0, 0.6), run_with("rope-kept", 0.1, 0.9)])
    [row] = [
        row
        for row in summary["over_seeds"]
        if (row["model"], row["haystack"], row["length"]) == (HYBRID_FULL, "text", 16384)
    ]
    assert (row["mean"], row["lowest"], row["highest"], row["seeds"]) == (pytest.approx(0.95), 0.9, 1.0, 2)
    assert row["spread"] == pytest.approx(0.05 * 2**0.5)
    met = {row["what"]: row["met"] for row in summary["bars"]}
    assert met == {
        "hybrid over teacher at 512 in text": True,
        "hybrid over teacher at 512 in noise": True,
        f"{HYBRID_FULL} at 16384 in text": False,
        f"{HYBRID_FULL} at 16384 in noise": True,
        f"{HYBRID_SPARSE} at 16384 in text": True,
        "blocks unread at 16384": False,
    }
    assert "rope-kept" in summary_table(summary)
