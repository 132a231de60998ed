"""The learning curve: looks at the hybrid while it trains, counts every token, and resumes."""

import json
from pathlib import Path
from typing import Any

import pytest

from sala.demo.learning_curve import draw_curves, run_curves, summarize_curves, teacher_tokens
from sala.demo.plots import save_plot
from sala.errors import InputError, RecipeError
from sala.recipe import load_recipe


def test_a_curve_counts_all_tokens_and_starts_where_a_hybrid_does(
    tmp_path: Path, teacher: Path, few_documents: None
) -> None:
    out = tmp_path / "results" / "curve.json"
    summary = run_curves(tmp_path / "work", out, recipe="smoke", teacher=str(teacher), seeds=[3])
    assert json.loads(out.read_text()) == json.loads(json.dumps(summary))
    stages = load_recipe("smoke").stages
    [run] = summary["runs"]
    # smoke takes more than a twentieth of its tokens at every step
    align = stages[0].tokens
    steps = [align + (step + 1) * stages[1].tokens // 2 for step in range(2)]
    expected = [("distill", align), *(("distill", tokens) for tokens in steps), ("long", steps[-1] + stages[2].tokens)]
    assert [(point["stage"], point["tokens"]) for point in run["points"]] == expected
    assert run["seed"] == 3
    assert len({point["loss"] for point in run["points"]}) == len(expected)
    assert summary["share_of_tokens"] == expected[-1][1] / teacher_tokens()

    written = (tmp_path / "work" / "seed-3.json").stat().st_mtime_ns
    run_curves(tmp_path / "work", out, recipe="smoke", teacher=str(teacher), seeds=[3])
    assert (tmp_path / "work" / "seed-3.json").stat().st_mtime_ns == written
    with pytest.raises(InputError, match="another recipe"):
        run_curves(tmp_path / "work", out, recipe="demo-quick", teacher=str(teacher), seeds=[3])
    with pytest.raises(RecipeError, match="needs a conversion"):
        run_curves(tmp_path / "work", out, recipe="teacher", teacher=str(teacher), seeds=[3])

    save_plot(tmp_path / "curve.png", draw_curves, summary)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("loss", "tokens", "met"), [(2.03, 250, True), (2.05, 250, False), (2.03, 260, False)])
def test_the_bar_is_of_loss_and_of_tokens(loss: float, tokens: int, met: bool) -> None:
    runs: list[dict[str, Any]] = [
        {"teacher_loss": 2.0, "points": [{"tokens": 10, "loss": 3.0}, {"tokens": tokens, "loss": value}]}
        for value in (loss - 0.01, loss + 0.01)
    ]
    summary = summarize_curves(runs, 1000)
    assert summary["met"] is met
    assert summary["loss_over_teacher"]["mean"] == pytest.approx(loss / 2)
    assert summary["loss_over_teacher"]["spread"] == pytest.approx(0.01 / 2**0.5)


def test_the_embedded_teachers_tokens_are_those_of_its_recipe() -> None:
    assert teacher_tokens() == 4_341_760


def test_the_language_recipe_stays_within_a_quarter_of_them() -> None:
    assert sum(stage.tokens for stage in load_recipe("language").stages) <= teacher_tokens() / 4
