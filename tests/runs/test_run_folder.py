"""The folder of a run has the history of the run that it goes on with, and of no other."""

import copy
import itertools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sala.errors import CheckpointError, InputError, RecipeError, SalaError
from sala.recipe import Recipe, load_recipe, override, parse_recipe
from sala.runs.checkpoint import Checkpoints
from sala.runs.folder import Measured, RunFolder, RunOptions, StageSaver
from sala.train.loop import Progress
from sala.train.parallel import ONE_PROCESS
from train.ranks import another_process

STEPS = 6
START: dict[str, Any] = {"checkpoint": None, "tokenizer": {"name": "words", "sha256": "1"}, "data": {}}


def recipe() -> Recipe:
    row = {"loss": "next_token", "length": 8, "batch": 1, "learning_rate": {"peak": 1.0}, "data": {"text": 1}}
    model = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    stages = [row | {"name": name, "steps": STEPS} for name in ("first", "second")]
    return parse_recipe({"name": "run", "model": model, "stages": stages})


FEED: Any = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)


def test_a_measurement_that_is_damaged_is_named(tmp_path: Path) -> None:
    measured = Measured(tmp_path, ONE_PROCESS)
    assert measured.once("kept", lambda: [1, 2]) == measured.once("kept", lambda: None) == [1, 2]
    (tmp_path / "kept.json").write_text("[1, ")
    with pytest.raises(InputError, match=rf"^{tmp_path / 'kept.json'} is damaged .*; delete it"):
        measured.once("kept", lambda: [1, 2])


def claim(path: Path) -> None:
    # what a run does first, before it writes its recipe
    Checkpoints(path / "checkpoints").claim()


def test_of_two_processes_the_second_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with another_process(claim, path):
        with pytest.raises(CheckpointError, match="is in use by another process; end that process first"):
            RunFolder(path, recipe(), START, ONE_PROCESS)
        assert not (path / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RunOptions(resume="previous"), "holds no checkpoint, and none before it"),
        (RunOptions(wandb_project="mine"), r"--wandb needs the package `wandb`"),
    ],
)
def test_what_is_asked_for_in_vain_leaves_no_folder(
    options: RunOptions, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SalaError, match=message):
        RunFolder(tmp_path / "run", recipe(), START, ONE_PROCESS, options)
    assert not (tmp_path / "run").exists()


def begun(path: Path) -> None:
    path.mkdir()
    recipe().save(path / "recipe.yaml")


PLAIN = yaml.safe_load(recipe().text)
ANOTHER_KIND = {name: value for name, value in PLAIN.items() if name not in ("model", "init")}


def changed(setting: str) -> dict[str, Any]:
    return override(copy.deepcopy(PLAIN), [setting])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed("name=other"), "has name = 'run', this recipe 'other'"),
        (changed("model.hidden_size=16"), "has model.hidden_size = 8, this recipe 16"),
        (changed("model.head_dim=8"), "has model.head_dim = None, this recipe 8"),
        (changed("sources.text.shards=a"), "has sources.text = None, this recipe {'shards': 'a', "),
        (changed("stages.first.steps=7"), "has stages.0.steps = 6, this recipe 7"),
        (ANOTHER_KIND | {"conversion": {"keep": {"count": 1}}}, "has model = {'hidden_size': 8, .*}, this recipe None"),
    ],
)
def test_another_recipe_is_refused_with_the_field(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(RecipeError, match=message):
        RunFolder(tmp_path / "run", parse_recipe(values), START, ONE_PROCESS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed("stages.second.steps=7"), "has stages.1.steps = 6, this recipe 7"),
        (PLAIN | {"stages": PLAIN["stages"][:1]}, "has the number of stages = 2, this recipe 1"),
    ],
)
def test_a_stage_may_change_until_it_has_begun(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    begun(path)
    for facts in (None, {"stage": 0}):
        monkeypatch.setattr("sala.runs.identity.newest_facts", lambda folder, facts=facts: facts)
        with RunFolder(path, parse_recipe(values), START, ONE_PROCESS):
            assert parse_recipe(values) == load_recipe(path / "recipe.yaml")
        with RunFolder(path, recipe(), START, ONE_PROCESS):
            pass
    monkeypatch.setattr("sala.runs.identity.newest_facts", lambda folder: {"stage": 1})
    with pytest.raises(RecipeError, match=message):
        RunFolder(path, parse_recipe(values), START, ONE_PROCESS)


def test_a_source_may_change_until_a_stage_that_reads_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = changed("sources.text.shards=a")
    values["sources"]["later"] = {"shards": "b"}
    values["stages"][1]["data"] = {"later": 1}
    start = START | {"data": {"text": "a of 3 documents", "later": "b of 4 documents"}}
    other = start | {"data": start["data"] | {"later": "c of 5 documents"}}
    path = tmp_path / "run"
    with RunFolder(path, parse_recipe(values), start, ONE_PROCESS):
        pass
    values["sources"]["later"]["shards"] = "c"
    with RunFolder(path, parse_recipe(values), other, ONE_PROCESS) as folder:
        assert folder.measured.known("start") == other
    with pytest.raises(InputError, match="drew 'text' from a of 3 documents"):
        RunFolder(path, parse_recipe(values), other | {"data": other["data"] | {"text": "d"}}, ONE_PROCESS)
    monkeypatch.setattr("sala.runs.identity.newest_facts", lambda folder: {"stage": 1})
    with pytest.raises(InputError, match="drew 'later' from c of 5 documents"):
        RunFolder(path, parse_recipe(values), start, ONE_PROCESS)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    (tmp_path / "run" / ".metrics.jsonl.123").write_text("{")
    run = RunFolder(tmp_path / "run", recipe(), START, ONE_PROCESS)
    assert not list((tmp_path / "run").glob(".*"))
    assert run.record is not None
    run.record.close()


class Run:
    """A run started on its folder; every step that it takes has a loss of its own, as no other start's has."""

    losses = itertools.count(1)

    def __init__(self, path: Path, resume: Any):
        self.state: dict[str, Any] = {"history": torch.zeros(2 * STEPS)}
        self.folder = RunFolder(path, recipe(), START, ONE_PROCESS, RunOptions(save_every=2, resume=resume))
        self.stage, self.step = len(self.folder.finished), 0
        if self.folder.saved is not None and self.stage < 2:
            progress = self.saver.restore(self.state, FEED)
            self.step = 0 if progress is None else progress.step
        if self.step == STEPS:
            self.stage, self.step = self.stage + 1, 0

    @property
    def saver(self) -> StageSaver:
        return self.folder.saver(self.stage)

    @property
    def done(self) -> bool:
        return self.stage == 2

    @property
    def history(self) -> list[float]:
        """The losses of all steps that led to its parameters, which the parameters know."""
        return [loss for loss in self.state["history"].tolist() if loss]

    def take_step(self) -> None:
        loss = float(next(self.losses))
        self.state["history"][self.stage * STEPS + self.step] = loss
        self.step += 1
        name = recipe().stages[self.stage].name
        progress = Progress(name, self.step, STEPS, loss, 1.0, 1.0, 8 * self.step, 1.0, 1.0, stage_index=self.stage)
        self.folder.recording(lambda progress: None)(progress)
        self.saver.after(progress, lambda: self.state, FEED)
        if self.step == STEPS:
            self.stage, self.step = self.stage + 1, 0

    def kill(self, random: random.Random) -> None:
        """Leave everything as it is; a checkpoint under way may or may not be written."""
        checkpoints = self.folder.checkpoints
        if checkpoints._writing is not None and random.random() < 0.5:
            checkpoints.wait()
        checkpoints._thread.shutdown()
        self.folder.record.close()


def written(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def drawn(path: Path) -> list[float]:
    accumulator = EventAccumulator(str(path / "tensorboard"))
    accumulator.Reload()
    scalars = accumulator.Scalars("loss") if accumulator.Tags()["scalars"] else []
    assert [event.step for event in scalars] == list(range(1, len(scalars) + 1))
    return [event.value for event in scalars]


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_and_resumed_in_any_order_has_written_down_its_own_steps(seed: int, tmp_path: Path) -> None:
    draw, path = random.Random(seed), tmp_path / "run"
    run, previous = Run(path, "newest"), 0
    while not run.done:
        assert written(path) == drawn(path) == run.history
        for _ in range(draw.randrange(5)):
            if not run.done:
                run.take_step()
                assert written(path) == run.history
        if run.done:
            break
        run.kill(draw)
        checkpoints = list((path / "checkpoints").glob("step-*"))
        resume = "previous" if len(checkpoints) > 1 and draw.random() < 0.4 else "newest"
        previous += resume == "previous"
        run = Run(path, resume)
    assert len(run.history) == 2 * STEPS and previous
    run.kill(draw)
