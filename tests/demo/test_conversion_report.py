"""The report of a conversion shows what was measured, of the models that the run has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sala.convert import Scorers
from sala.data import load_tokenizer
from sala.demo.conversion import HYBRID, TEACHER, ReportPlan, report_conversion, stages_of
from sala.errors import InputError
from sala.model.checkpoint import find_checkpoint
from sala.model.families import load_model
from sala.recipe import load_recipe
from sala.runs import Origin, run_recipe

NAME = "embedded-teacher"
PROSE = "It was the best of times, it was the worst of times. " * 400


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversion")
    (folder / "prose.txt").write_text(PROSE)
    settings = ["conversion.keep={count: 1, method: uniform}", "validation={every: 1, windows: 2, length: 64}"]
    run_recipe(
        load_recipe("smoke", settings),
        folder / "run",
        tokenizer=load_tokenizer(find_checkpoint(NAME)),
        model=load_model(NAME, dtype=torch.float32),
        scorers=Scorers(lambda model: 0.0, lambda model: 0.0),
        origin=Origin.of(NAME),
    )
    return folder / "run"


def test_a_report_measures_both_models(run: Path, tmp_path: Path) -> None:
    plan = ReportPlan((64, 200), ("ppl",), 2, ("x <= 1",), 4, prose=run.parent / "prose.txt", divergence_windows=2)
    results = report_conversion(run, tmp_path / "report", plan)
    written = json.loads((tmp_path / "report" / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    for name in (TEACHER, HYBRID):
        rows = results["quality"][name]
        assert [(row["task"], row["length"], row["samples"]) for row in rows] == [("ppl", 64, 2), ("ppl", 200, 2)]
    assert results["teacher"] == NAME and results["divergence"]["mean"] > 0
    assert {(point["model"], point["length"]) for point in results["latency"]} == {
        (name, length) for name in (TEACHER, HYBRID) for length in (64, 200)
    }
    assert [one["model"] for one in results["answers"]] == [TEACHER, HYBRID]
    assert [stage["name"] for stage in results["stages"]] == ["align", "distill", "long"]
    assert len(results["stages"][0]["validation"]) == 2
    page = (tmp_path / "report" / "index.html").read_text()
    assert "x &lt;= 1" in page and "None" not in page and "smoke" in page
    assert page.count('class="layer ') == 4


def test_what_is_no_finished_conversion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no folder final; expected a finished run of `sala convert`"):
        report_conversion(tmp_path, tmp_path / "report", ReportPlan())


def test_a_stage_is_told_by_its_smoothed_ends() -> None:
    rows: list[dict[str, Any]] = [
        {"stage": "a", "stage_index": 0, "step": n, "tokens": 8 * n, "loss": 2.0, "validation_loss": None}
        for n in (1, 2)
    ]
    rows[1]["validation_loss"] = 1.5
    assert stages_of(rows) == [
        {"name": "a", "steps": 2, "tokens": 16, "first_loss": 2.0, "loss": 2.0, "validation": [[16, 1.5]]}
    ]
