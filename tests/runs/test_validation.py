"""The validation loss: of the same held-out windows at every look, and without a say in the training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from sala.data import Document, train_tokenizer
from sala.errors import RecipeError
from sala.recipe import parse_recipe
from sala.runs import run_recipe
from sala.runs.stages import StageRunner, ignore
from sala.train import World
from sala.train.batches import read_corpus
from sala.train.parallel import ALONE
from train import ranks

TEXT = "def read(path):\n    return open(path).read()\n" * 40
OTHER = "class Reader:\n    def write(self, line):\n        self.lines.append(line)\n" * 20
MODEL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
STAGE = {
    "name": "first",
    "loss": "next_token",
    "length": 32,
    "batch": 2,
    "steps": 5,
    "learning_rate": {"peak": 1e-2},
    "data": {"text": 1},
}
VALIDATION = {"length": 48, "windows": 6, "every": 2}


def recipe(**changes: Any) -> Any:
    return parse_recipe({"name": "tiny", "compile": "off", "model": MODEL, "stages": [STAGE]} | changes)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([Document("a.py", TEXT + OTHER)], vocab_size=300)


@pytest.fixture(autouse=True)
def held_out_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sala.train.batches.library_documents", lambda split: [Document(split, OTHER)])


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_of_held_out_windows_is_that_of_the_model_and_changes_no_step(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = read_corpus(tokenizer, [Document("a.py", TEXT)])
    given: dict[str, Any] = {"tokenizer": tokenizer, "data": data}
    model = run_recipe(recipe(validation=VALIDATION), tmp_path / "with", **given)
    run_recipe(recipe(), tmp_path / "without", **given)
    validated, plain = rows(tmp_path / "with"), rows(tmp_path / "without")
    assert [row["loss"] for row in validated] == [row["loss"] for row in plain]
    looks = [row["validation_loss"] for row in validated]
    assert [look is not None for look in looks] == [False, True, False, True, True]
    assert all(row["validation_loss"] is None for row in plain)

    held_out = read_corpus(tokenizer, [Document("valid", OTHER)])
    runner = StageRunner(recipe(validation=VALIDATION), data, ignore, held_out=held_out)
    windows = runner._held_out(ALONE)
    assert windows is not None and windows.batch.input_ids.shape == (6, 48)
    with torch.no_grad():
        logits = model(windows.batch.input_ids).logits[:, :-1]
    wanted = F.cross_entropy(logits.flatten(0, 1), windows.batch.input_ids[:, 1:].flatten())
    assert looks[-1] == pytest.approx(wanted.item(), rel=1e-5)
    card = (tmp_path / "with" / "final" / "README.md").read_text()
    assert f"| {looks[-1]:.4g} |" in card


def validate(world: World, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    from sala.train import batches

    batches.library_documents = lambda split: [Document(split, OTHER)]  # type: ignore[assignment]
    given = recipe(validation=VALIDATION, mesh={"dp_shard": world.ranks})
    data = read_corpus(tokenizer, [Document("a.py", TEXT)])
    run_recipe(given, out, tokenizer=tokenizer, data=data, world=world)


def test_two_ranks_look_at_the_same_windows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for count in (1, 2):
        ranks.spawn(count, validate, tmp_path, tokenizer, tmp_path / str(count))
    one, two = ([row["validation_loss"] for row in rows(tmp_path / str(count))] for count in (1, 2))
    assert two[1] == pytest.approx(one[1], rel=1e-4) and two[-1] == pytest.approx(one[-1], rel=1e-4)


def test_windows_that_a_stage_trains_on_are_refused() -> None:
    sources = {"web": {"shards": "web"}, "valid": {"shards": "valid"}}
    stages = [STAGE | {"data": {"web": 1}}]
    recipe(sources=sources, stages=stages, validation={"data": {"valid": 1}})
    with pytest.raises(RecipeError, match="validation: stage 'first' trains on 'web'; expected a source of its own"):
        recipe(sources=sources, stages=stages, validation={"data": {"web": 1}})
    with pytest.raises(RecipeError, match="'vaild', which is not one of the sources: web, valid; did you mean 'valid'"):
        recipe(sources=sources, stages=stages, validation={"data": {"vaild": 1}})


def in_bfloat16(world: World, tokenizer: PreTrainedTokenizerFast, out: Path) -> dict[str, torch.Tensor]:
    from sala.train import batches

    batches.library_documents = lambda split: [Document(split, OTHER)]  # type: ignore[assignment]
    data, found = read_corpus(tokenizer, [Document("a.py", TEXT)]), {}
    for name, changes in (("without", {}), ("with", {"validation": VALIDATION | {"every": 1}})):
        given = recipe(precision="bfloat16", mesh={"dp_shard": world.ranks}, **changes)
        model = run_recipe(given, out / name, tokenizer=tokenizer, data=data, world=world)
        found |= {f"{name} {key}": tensor.clone() for key, tensor in model.state_dict().items()}
    return found


def test_a_look_leaves_the_shards_as_they_were(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Parameters that a look gathers in bfloat16 are not what is saved."""
    found = ranks.spawn(2, in_bfloat16, tmp_path, tokenizer, tmp_path / "runs")[0]
    names = [key.removeprefix("with ") for key in found if key.startswith("with ")]
    assert names and all(torch.equal(found[f"with {name}"], found[f"without {name}"]) for name in names)
    losses = [[row["loss"] for row in rows(tmp_path / "runs" / name)] for name in ("with", "without")]
    assert losses[0] == losses[1]
