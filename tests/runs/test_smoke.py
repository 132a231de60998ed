"""The smoke recipe end to end: a teacher becomes a folder that loads as the hybrid it was."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sala.data import Document, train_tokenizer
from sala.model.families import load_model
from sala.recipe import load_recipe
from sala.runs import Scorers, run_recipe
from sala.train import read_corpus

TEXT = "def read(path):\n    return open(path).read()\n" * 40


def test_a_conversion_writes_what_it_returns(
    teacher_of: Callable, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as on a GPU that is known: every stage counts its operations, alignment too
    monkeypatch.setattr("sala.runs.stages.peak_flops", lambda device, precision: 1e12)
    tokenizer = train_tokenizer([Document("a.py", TEXT)], vocab_size=300)
    teacher = teacher_of(family, vocab_size=len(tokenizer))
    recipe = load_recipe("smoke")
    seen: list[tuple[str, int]] = []
    hybrid = run_recipe(
        recipe,
        tmp_path / "run",
        model=teacher,
        scorers=Scorers(lambda model: 0.5, lambda model: 0.5),
        tokenizer=tokenizer,
        data=read_corpus(tokenizer, [Document("a.py", TEXT)]),
        observer=lambda progress: seen.append((progress.stage, progress.step)),
    )
    assert seen == [("align", 1), ("align", 2), ("distill", 1), ("distill", 2), ("long", 1)]
    final = tmp_path / "run" / "final"
    loaded = load_model(final)
    # long enough for blocks to be left out
    ids = torch.randint(len(tokenizer), (1, 100), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(ids).logits, hybrid(ids).logits)
    assert loaded.config.attn_logits_scaling == 64
    written = json.loads((final / "report.json").read_text())
    assert written["mixer_types"] == hybrid.config.mixer_types
    assert {"selection.json", "README.md"} <= {path.name for path in final.iterdir()}
    for name in ("selection.json", "selection.png"):
        assert (tmp_path / "run" / name).read_bytes() == (final / name).read_bytes()
    assert set(written["step_zero"]) == {"gates", "positions", "linear_layers", "all"}
    assert load_recipe(final / "recipe.yaml").resolved == recipe.resolved
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(seen)
