"""Pictures: that they hold what was measured."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sala.eval import plots
from sala.eval.blocks import BlockCount
from sala.eval.papers import REFERENCES, references
from sala.eval.summary import summarize
from sala.eval.task import Task

PNG = b"\x89PNG"


def task(name: str, group: str) -> Task:
    return Task(name, lambda *_: pytest.fail(), lambda *_: 0.0, group)


def record(name: str, length: int, **facts: Any) -> dict[str, Any]:
    return {"task": name, "length": length, "index": 0, "prompt": "p", "tokens": length, "score": 0.5, **facts}


def test_a_run_is_drawn_by_group_beside_what_papers_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    original = plots._draw_task
    monkeypatch.setattr(plots, "_draw_task", lambda axes, name, runs: drawn.append(name) or original(axes, name, runs))
    tasks = {"a": task("a", "ruler"), "b": task("b", "ruler"), "ppl": task("ppl", "perplexity")}
    records = [record(name, length, depths=[0.5]) for name in ("a", "b") for length in (512, 4096)]
    records += [record("ppl", 512)]
    plots.write_plots(summarize(records, tasks), records, tmp_path, "model")
    assert drawn == ["ruler average of 2", "ppl"]
    assert {path.name for path in tmp_path.iterdir()} == {"scores.png", "needles-ruler.png"}
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.iterdir())


def test_equal_results_give_equal_files(tmp_path: Path) -> None:
    records = [record("a", 512, depths=[0.1, 0.9], right=[True, False])]
    for name in ("one.png", "two.png"):
        plots.plot_needles(tmp_path / name, records)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_each_needle_counts_by_itself_and_errors_do_not() -> None:
    assert plots._needles(record("a", 512, depths=[0.1, 0.9], right=[True, False])) == [(0.1, True), (0.9, False)]
    assert plots._needles(record("a", 512, depths=[0.1, 0.9])) == [(0.1, 0.5), (0.9, 0.5)]
    assert plots._needles({**record("a", 512, depths=[0.1]), "error": "status 500"}) == []


@pytest.mark.parametrize(("places", "found"), [((20,), 2), ((36,), 1), ((20, 36), 1), ((100,), 0)])
def test_groups_that_chose_all_blocks_of_the_evidence_are_counted(
    tmp_path: Path, places: tuple[int, ...], found: int
) -> None:
    chosen = {0: torch.tensor([[0, 2, 4], [0, 2, -1]])}
    count = BlockCount(8, [torch.tensor([127])], [], [], chosen)
    assert plots.plot_blocks(tmp_path / "blocks.png", count, places) == found


def test_rulers_published_scores_belong_to_its_average() -> None:
    assert [reference.model for reference in references("ruler average of 13")] == ["MiniCPM-SALA 9B", "Qwen3-8B"]
    assert references("niah_single_1") == []
    sala = next(reference for reference in REFERENCES if reference.task == "ruler")
    assert sala.scores[64 * 1024] == 92.65 and sala.scores[2048 * 1024] == 81.6
