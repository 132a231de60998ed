"""The demo from end to end, on a teacher that knows nothing."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_plan import PLAN

from sala.data import load_tokenizer
from sala.demo import PHASES, Moment, run_demo
from sala.demo.measure import HYBRID_FULL, HYBRID_SPARSE, TEACHER
from sala.demo.page import write_page
from sala.demo.plots import PLOTS
from sala.errors import InputError, RecipeError
from sala.model.families import load_model

Demo = tuple[Path, Any, list[Moment]]


def test_the_report_holds_page_plots_results_and_hybrid(demo: Demo) -> None:
    out, results, _ = demo
    assert {path.name for path in out.iterdir()} == {"index.html", "results.json", "hybrid", *PLOTS}
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_hybrid_is_a_checkpoint_with_its_tokenizer(demo: Demo) -> None:
    out, results, _ = demo
    hybrid = load_model(out / "hybrid")
    assert list(hybrid.config.mixer_types) == results["hybrid"]["mixer_types"]
    assert len(load_tokenizer(out / "hybrid")) == hybrid.config.vocab_size


def test_the_page_refers_to_nothing_outside_it(demo: Demo) -> None:
    page = (demo[0] / "index.html").read_text()
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page) == []
    assert "@import" not in page
    assert "url(" not in page
    assert "<script" not in page
    assert not re.search(r"https?://", page)
    assert "$" not in re.sub(r"<pre>.*</pre>", "", page, flags=re.DOTALL)


def test_the_page_can_be_read_in_the_dark(demo: Demo) -> None:
    page = (demo[0] / "index.html").read_text()
    assert "color-scheme: light dark" in page
    [dark] = re.findall(r"prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}", page)
    light = page.partition(":root {")[2].partition("}")[0]
    # what is drawn on colours of its own stays
    names = set(re.findall(r"--\w+", light)) - {"--softmax", "--sparse"}
    assert set(re.findall(r"--\w+", dark)) == names


def test_what_is_not_known_is_said_in_words(demo: Demo, tmp_path: Path) -> None:
    out, results, _ = demo
    environment = results["environment"]
    nothing = dict.fromkeys(environment["hardware"]) | {"cores": 2, "torch_threads": 1}
    unknown = environment | {"commit": None, "hardware": nothing}
    unknown["versions"] = {"torch": "2", "triton": None, "fla-core": None}
    for name in PLOTS:
        (tmp_path / name).write_bytes((out / name).read_bytes())
    write_page(results | {"environment": unknown}, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "torch 2; not installed: triton, fla-core" in page
    assert "None" not in page


def test_every_plotted_number_is_in_the_results(demo: Demo) -> None:
    _, results, _ = demo
    models = {TEACHER, HYBRID_FULL, HYBRID_SPARSE}
    asked = {(p["model"], p["haystack"], p["length"]) for p in results["retrieval"]}
    assert asked == {(m, h, n) for m in models for h in ("text", "noise") for n in PLAN.lengths}
    for point in results["retrieval"]:
        assert 0.0 <= point["low"] <= point["accuracy"] <= point["high"] <= 1.0
        assert point["questions"] == sum(part["questions"] for part in point["depths"])
        assert (point["unread_share"] is None) == (point["model"] != HYBRID_SPARSE)
    timed = {(p["model"], p["length"]) for p in results["latency"]}
    assert timed == {(m, n) for m in models for n in PLAN.repeats}
    assert {row["stage"] for row in results["conversion"]["steps"]} == {"align", "distill", "long"}


def test_results_say_how_they_came_about(demo: Demo) -> None:
    _, results, _ = demo
    assert results["recipe"]["name"] == "smoke"
    assert results["environment"]["versions"]["torch"]
    assert results["environment"]["hardware"]["cores"] >= 1
    assert set(results["seeds"]) == {"conversion", "evaluation", "needle"}
    assert results["trained_length"] == {"teacher": 64, "hybrid": 128}
    assert results["seconds"]["total"] == pytest.approx(
        sum(value for name, value in results["seconds"].items() if name != "total")
    )


def test_the_observer_sees_every_phase_to_its_end(demo: Demo) -> None:
    moments = demo[2]
    assert list(dict.fromkeys(moment.phase for moment in moments)) == list(PHASES)
    for stage in {moment.stage for moment in moments}:
        steps = [moment for moment in moments if moment.stage == stage]
        assert steps[-1].step == steps[-1].steps
        assert [moment.step for moment in steps] == sorted(moment.step for moment in steps)
    assert all(moment.loss is not None for moment in moments if moment.phase == "convert")


def test_a_folder_that_is_no_report_is_not_replaced(tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="not a report"):
        run_demo(tmp_path, teacher=teacher, plan=PLAN)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_recipe_that_trains_from_scratch_is_refused(tmp_path: Path, teacher: Path) -> None:
    recipe = tmp_path / "scratch.yaml"
    recipe.write_text(
        "name: scratch\nmodel: {hidden_size: 8}\nstages:\n  - {name: a, loss: next_token, length: 64, batch: 1, steps: 1,"
        " learning_rate: {peak: 0.001}, data: {text: 1}}\n"
    )
    with pytest.raises(RecipeError, match="needs a conversion"):
        run_demo(tmp_path / "report", teacher=teacher, plan=replace(PLAN, recipe=str(recipe)))
