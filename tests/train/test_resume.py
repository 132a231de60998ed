"""A run that is killed, stopped, or damaged, and goes on, ends as one that was left alone."""

import json
import random
import signal
from pathlib import Path

import pytest

from train import ranks, runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, a teacher and shards."""
    path = tmp_path_factory.mktemp("start")
    runs.prepare(path)
    return path


@pytest.mark.parametrize("kind", ["new", "conversion", "shards"])
def test_a_run_killed_at_any_moment_ends_as_one_left_alone(kind: str, folder: Path, tmp_path: Path) -> None:
    given, draw = runs.recipe(kind, folder), random.Random(kind)
    (moments,) = ranks.spawn(1, runs.work, tmp_path, given, folder, tmp_path / "alone")
    kills, killed = 0, [tmp_path / "killed-0"]
    while kills < 10:
        death = (0, draw.randrange(1, moments))
        (code,) = ranks.codes_of(1, runs.work, tmp_path, given, folder, killed[-1], death)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0:
            killed.append(tmp_path / f"killed-{len(killed)}")
    ranks.spawn(1, runs.work, tmp_path, given, folder, killed[-1])
    for out in killed:
        require_same(out, tmp_path / "alone")


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
