"""A run that is killed, stopped, or damaged, and goes on, ends as one that was left alone."""

import json
import random
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runs import small_runs as runs
from sala.recipe import parse_recipe
from sala.train.weights import PREFIX
from train import ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a teacher and shards."""
    path = tmp_path_factory.mktemp("start")
    runs.prepare(path)
    return path


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return (run left alone, its moments) of a kind on a number of ranks; each runs once."""
    path, moments = tmp_path_factory.mktemp("done"), {}

    def run(kind: str, num_ranks: int = 1) -> tuple[Path, int]:
        out = path / f"{kind}-{num_ranks}"
        if out not in moments:
            given = runs.recipe(kind, folder, mesh={"dp_shard": num_ranks})
            moments[out] = ranks.spawn(num_ranks, runs.work, path, given, folder, out)[0]
            assert isinstance(moments[out], int), moments[out]
        return out, moments[out]

    return run


def require_same(out: Path, alone: Path, num_ranks: int = 1) -> None:
    """Require that a run that went on is the run left alone, and did nothing again that it had written down."""
    outcome = runs.outcome(out, num_ranks)
    assert outcome == runs.outcome(alone, num_ranks)
    assert all(len(documents) == num_ranks for documents in outcome.batches.values())
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}
    for line in out.with_name(f"{out.name}-0.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event.get("said", "").startswith("scoring layer"):
            layer = int(event["said"].split()[2]) - 1
            assert f"layer_scores-{layer:04d}.json" not in event["known"]


@pytest.mark.parametrize("kind", ["new", "conversion", "shards"])
def test_a_run_killed_at_any_moment_ends_as_one_left_alone(kind: str, folder: Path, done: Any, tmp_path: Path) -> None:
    given, draw = runs.recipe(kind, folder), random.Random(kind)
    alone, moments = done(kind)
    kills, killed = 0, [tmp_path / "killed-0"]
    while kills < 10:
        at = draw.randrange(1, moments)
        (code,) = ranks.codes_of(1, runs.work, tmp_path, given, folder, killed[-1], at=at)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0:
            killed.append(tmp_path / f"killed-{len(killed)}")
    ranks.spawn(1, runs.work, tmp_path, given, folder, killed[-1])
    for out in killed:
        require_same(out, alone)


@pytest.mark.parametrize("kind", ["conversion", "shards"])
def test_two_ranks_go_on_on_two_and_on_one(kind: str, folder: Path, done: Any, tmp_path: Path) -> None:
    given = runs.recipe(kind, folder, mesh={"dp_shard": 2})
    alone, moments = done(kind, 2)
    out = tmp_path / "killed"
    # while the second stage goes on; rank 0 writes, and rank 1 does almost nothing else than steps
    codes = ranks.codes_of(2, runs.work, tmp_path, given, folder, out, at=moments * 2 // 3)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    assert list(out.glob(f"{PREFIX}*"))
    other = shutil.copytree(out, tmp_path / "other")
    ranks.spawn(2, runs.work, tmp_path, given, folder, out)
    require_same(out, alone, 2)
    finished = ranks.spawn(2, runs.work, tmp_path, given, folder, out)
    assert finished == [f"0 the run in '{out}' is finished: its model is '{out / 'final'}'"] * 2
    require_same(out, alone, 2)
    (moments,) = ranks.spawn(1, runs.work, tmp_path, runs.recipe(kind, folder), folder, other)
    assert isinstance(moments, int), moments
    assert not list(other.glob(f"{PREFIX}*"))
    steps, wanted = runs.outcome(other).steps, runs.outcome(alone, 2).steps
    assert [step[:2] for step in steps] == [step[:2] for step in wanted]
    for one, two in zip(steps, wanted, strict=True):
        assert one[2:] == pytest.approx(two[2:], rel=1e-4, abs=1e-5)


def test_a_conversion_on_two_ranks_is_that_of_one_process(done: Any) -> None:
    two, one = (runs.outcome(done("conversion", num_ranks)[0], num_ranks).steps for num_ranks in (2, 1))
    assert [step[:2] for step in two] == [step[:2] for step in one]
    for ours, wanted in zip(two, one, strict=True):
        assert ours[2:] == pytest.approx(wanted[2:], rel=1e-5, abs=1e-6)


def test_a_loss_that_is_no_number_stops_all_ranks_and_names_the_one(folder: Path, tmp_path: Path) -> None:
    given = runs.recipe("shards", folder, mesh={"dp_shard": 2})
    stops = ranks.spawn(2, runs.work, tmp_path, given, folder, tmp_path / "run", spoil=3, on_rank=1)
    assert stops[0] == stops[1]
    assert stops[0].startswith(
        "2 the loss is nan at step 3 of stage 'short', before the optimizer moved; the batch holds rank 1: "
    )
    assert "rank 0" not in stops[0]
    names = [json.loads(line) for line in (tmp_path / "run-1.jsonl").read_text().splitlines()][-1]["batch"]
    assert all(name in stops[0] for name in names)
    # the checkpoint from before it was being written, and is there
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-0000000002"]


def test_a_signal_saves_and_the_same_command_goes_on(folder: Path, done: Any, tmp_path: Path) -> None:
    given, out = runs.recipe("conversion", folder), tmp_path / "stopped"
    alone, moments = done("conversion")
    start = partial(ranks.spawn, 1, runs.work, tmp_path, given, folder, out, save_every=100)
    assert start(at=moments // 3, number=signal.SIGTERM)[0].startswith("143 stopped ")
    assert start(at=moments // 4, number=signal.SIGINT)[0].startswith("130 stopped ")
    assert isinstance(start()[0], int)
    require_same(out, alone)
    assert start()[0].startswith(f"0 the run in '{out}' is finished: its model is")


def require_full(stops: list[Any], out: Path) -> None:
    """Require that every rank stopped with the same line, which says where the run goes on."""
    (said,) = set(stops)
    assert said.startswith("2 ") and said.count("No space left on device") == 1 and str(out) in said, said
    if (out / "metrics.jsonl").is_file():
        assert re.search(
            r"; once that is put right, the same command goes on (after step \d|from the beginning)", said
        ), said


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(folder: Path, done: Any, tmp_path: Path) -> None:
    given, out, draw = runs.recipe("conversion", folder), tmp_path / "full", random.Random(1)
    start = partial(ranks.spawn, 1, runs.work, tmp_path, given, folder, out)
    for full in (1, 3, draw.randrange(5, 15), draw.randrange(5, 15)):
        require_full(start(full=full), out)
    assert isinstance(start()[0], int)
    require_same(out, done("conversion")[0])


def test_a_disk_that_is_full_for_one_rank_stops_all(folder: Path, done: Any, tmp_path: Path) -> None:
    given, out = runs.recipe("conversion", folder, mesh={"dp_shard": 2}), tmp_path / "full"
    start = partial(ranks.spawn, 2, runs.work, tmp_path, given, folder, out)
    # rank 1 writes its parts of checkpoints, and what it has measured
    for on_rank, full in ((0, 7), (1, 2), (1, 3)):
        require_full(start(full=full, on_rank=on_rank), out)
    assert all(isinstance(moments, int) for moments in start())
    require_same(out, done("conversion", 2)[0], 2)


def test_a_damaged_newest_checkpoint_is_passed_over_only_when_asked(folder: Path, done: Any, tmp_path: Path) -> None:
    alone, _ = done("shards")
    out = shutil.copytree(alone, tmp_path / "run")
    shutil.copy(alone.with_name(f"{alone.name}-0.jsonl"), tmp_path / "run-0.jsonl")
    shutil.rmtree(out / "final")
    damaged = next((out / "checkpoints" / "step-0000000007").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    start = partial(ranks.spawn, 1, runs.work, tmp_path, runs.recipe("shards", folder), folder, out)
    assert "--resume previous would use step-0000000006" in start()[0]
    assert not (out / "final").exists()
    assert isinstance(start(resume="previous")[0], int)
    require_same(out, alone)


def test_a_run_goes_on_as_what_it_is(folder: Path, done: Any, tmp_path: Path) -> None:
    alone, _ = done("conversion")
    out = shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(out / "final")
    values = runs.recipe("conversion", folder).resolved

    def start(start_folder: Path = folder, path: Path = out, **changes: Any) -> Any:
        given = parse_recipe(values | changes)
        return ranks.spawn(1, runs.work, tmp_path, given, start_folder, path)[0]

    first = values["stages"][0]
    other = [first | {"learning_rate": {"peak": 2e-3}}, *values["stages"][1:]]
    assert "stages.0.learning_rate.peak = 0.001, this recipe 0.002" in start(stages=other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert "is no folder of a run" in start(path=tmp_path / "mine")
    # another teacher of the same shape
    changed = shutil.copytree(folder, tmp_path / "changed")
    model = runs.load_model(changed)
    model.model.norm.weight.data += 1
    model.save_pretrained(changed)
    assert f"started with another checkpoint; expected its own ('{folder}')" in start(changed)
    # how it is run may change
    assert isinstance(start(stages=[first | {"micro_batch": 1}, *values["stages"][1:]], compile="auto"), int)


def test_the_model_of_a_run_is_exported_and_the_run_left_as_it_is(folder: Path, done: Any, tmp_path: Path) -> None:
    for kind, step in (("conversion", 3), ("shards", 2)):
        run, _ = done(kind)
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        (last,) = ranks.spawn(1, runs.export, tmp_path, run, tmp_path / f"{kind}-newest", "newest")
        assert last.step == last.steps
        assert runs.weights_of(tmp_path / f"{kind}-newest") == runs.weights_of(run / "final")
        (earlier,) = ranks.spawn(1, runs.export, tmp_path, run, tmp_path / f"{kind}-previous", "previous")
        assert earlier.step == step
        assert runs.weights_of(tmp_path / f"{kind}-previous") != runs.weights_of(run / "final")
        assert "The training is not finished" in (tmp_path / f"{kind}-previous" / "README.md").read_text()
        assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
