"""What a run writes about itself survives a kill, forgets what is undone, and reads back as it was."""

import dataclasses
import errno
import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sala.errors import DiskError, InputError
from sala.runs.record import Record, short, smooth
from sala.train import memory
from sala.train.loop import Progress
from sala.train.memory import peak_memory_bytes

CONFIG = {"stages": [{"name": "align", "steps": 3}, {"name": "long", "steps": 4}]}


def step(stage_index: int, number: int, **changes: Any) -> Progress:
    stage = CONFIG["stages"][stage_index]
    values = {
        "loss": 10.0 * stage_index + number,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "tokens": 64 * number,
        "tokens_per_s": 1000.0,
        "seconds_left": 2.0,
        "memory_bytes": 2**29,
        "stage_index": stage_index,
    }
    return Progress(stage=stage["name"], step=number, steps=stage["steps"], **(values | changes))


WHOLE_RUN = [step(0, 1), step(0, 2), step(0, 3), step(1, 1), step(1, 2), step(1, 3), step(1, 4)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return accumulator


def drawn(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def test_a_step_is_a_line_with_all_of_its_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = step(0, 1, layer_errors=(0.25, 0.5), mfu=0.4)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    with Record(tmp_path, config=CONFIG) as record:
        record(progress)
    (line,) = lines(tmp_path)
    assert line == dataclasses.asdict(progress) | {"layer_errors": [0.25, 0.5], "time": 1e9}


def test_tensorboard_counts_steps_over_all_stages(tmp_path: Path) -> None:
    with Record(tmp_path, config=CONFIG) as record:
        for progress in WHOLE_RUN:
            record(progress)
    assert drawn(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 11.0), (5, 12.0), (6, 13.0), (7, 14.0)]


def test_tensorboard_has_every_metric_that_is_known(tmp_path: Path) -> None:
    for name in ("cpu", "gpu"):
        (tmp_path / name).mkdir()
    known = {"loss", "learning_rate", "gradient_norm", "tokens_per_s", "memory_gib"}
    with Record(tmp_path / "cpu", config=CONFIG) as record:
        record(step(0, 1))
    assert set(events(tmp_path / "cpu").Tags()["scalars"]) == known
    with Record(tmp_path / "gpu", config=CONFIG) as record:
        record(step(0, 1, mfu=0.5, layer_errors=(0.25, 0.75)))
    assert set(events(tmp_path / "gpu").Tags()["scalars"]) == known | {"mfu", "layer_errors/00", "layer_errors/01"}
    assert drawn(tmp_path / "gpu", "memory_gib") == [(1, 0.5)]
    assert drawn(tmp_path / "gpu", "layer_errors/01") == [(1, 0.75)]


def test_a_step_is_on_disk_before_the_next_one(tmp_path: Path) -> None:
    record = Record(tmp_path, config=CONFIG)
    record(step(0, 1))
    # nothing was closed: so a killed process leaves it
    assert len(lines(tmp_path)) == 1
    assert drawn(tmp_path, "loss") == [(1, 1.0)]
    record.close()


@pytest.mark.parametrize(("kept", "torn"), [(0, b""), (2, b'{"stage": "al'), (3, b""), (4, b"{}"), (6, b'{"stage')])
@pytest.mark.parametrize("lost", [False, True])
def test_a_resumed_run_has_every_step_once(
    tmp_path: Path, kept: int, torn: bytes, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = b""
    with Record(tmp_path, config=CONFIG) as record:
        for number, progress in enumerate(WHOLE_RUN[:6], start=1):
            record(progress if number <= kept else dataclasses.replace(progress, loss=-1.0))
            history = record.history if number == kept else history
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    if lost:
        # it went on from before, and was killed
        Record(tmp_path, config=CONFIG).close()
    # also when the clock was set back meanwhile
    monkeypatch.setattr(time, "time", lambda: 1e9)
    with Record(tmp_path, config=CONFIG, history=history) as record:
        for progress in WHOLE_RUN[kept:]:
            record(progress)
    assert [(row["stage_index"], row["step"], row["loss"]) for row in lines(tmp_path)] == [
        (progress.stage_index, progress.step, progress.loss) for progress in WHOLE_RUN
    ]
    assert drawn(tmp_path, "loss") == [(i + 1, progress.loss) for i, progress in enumerate(WHOLE_RUN)]


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard/events.out"])
def test_a_file_that_takes_no_more_is_one_error_and_keeps_whole_steps(tmp_path: Path, name: str) -> None:
    # the file named grows over the limit, the other one is far from it
    errors = tuple(0.5 for _ in range(200)) if name != "metrics.jsonl" else ()
    record = Record(tmp_path, config=CONFIG)
    record(step(0, 1, layer_errors=errors))
    path = next(tmp_path.glob(f"{name}*"))
    whole, events_before = path.read_bytes(), drawn(tmp_path, "loss")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
    try:
        with pytest.raises(DiskError, match=f"^'{path}' cannot be written: File too large$"):
            record(step(0, 2, layer_errors=errors))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole and drawn(tmp_path, "loss") == events_before
    record.close()
    assert path.read_bytes() == whole


def test_a_file_that_cannot_begin_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match=f"^'{tmp_path / 'metrics.jsonl'}' cannot be written: No space left on device$"):
        Record(tmp_path, config=CONFIG)
    assert list(tmp_path.iterdir()) == []


class FakeWandb:
    """Stands for the package: remembers what it was told."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.axes: list[tuple[str, str | None]] = []
        self.finished = 0

    def init(self, **settings: Any) -> SimpleNamespace:
        self.started.append(settings)
        return SimpleNamespace(
            id=settings["id"] or "fresh", log=self.logged.append, finish=self._finish, define_metric=self._axis
        )

    def _axis(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def _finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    package = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_wandb_gets_what_tensorboard_gets(tmp_path: Path, wandb: FakeWandb) -> None:
    with Record(tmp_path, config=CONFIG, wandb_project="hybrids") as record:
        record(step(1, 2))
    assert wandb.started[0] | {"dir": None} == {
        "project": "hybrids",
        "id": None,
        "resume": "allow",
        "name": tmp_path.name,
        "config": CONFIG,
        "dir": None,
    }
    assert wandb.logged == [
        {
            "global_step": 5,
            "loss": 12.0,
            "learning_rate": 1e-3,
            "gradient_norm": 0.5,
            "tokens_per_s": 1000.0,
            "memory_gib": 0.5,
        }
    ]
    assert ("*", "global_step") in wandb.axes
    assert wandb.finished == 1


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path: Path, wandb: FakeWandb) -> None:
    for _ in range(2):
        Record(tmp_path, config=CONFIG, wandb_project="hybrids").close()
    assert [settings["id"] for settings in wandb.started] == [None, "fresh"]
    with pytest.raises(InputError, match="'hybrids', which would be right"):
        Record(tmp_path, config=CONFIG, wandb_project="others")


def test_without_the_option_wandb_is_not_touched(tmp_path: Path, wandb: FakeWandb) -> None:
    with Record(tmp_path, config=CONFIG) as record:
        record(step(0, 1))
    assert not wandb.started
    assert not (tmp_path / "wandb.json").exists()


def test_wandb_that_is_not_installed_is_named_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'sala\[wandb\]'"):
        Record(tmp_path, config=CONFIG, wandb_project="hybrids")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_memory_is_the_peak_that_the_system_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(memory, "STATUS", status)
    assert peak_memory_bytes(torch.device("cpu")) == 0
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert peak_memory_bytes(torch.device("cpu")) == 2 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_memory_of_this_process_is_known() -> None:
    assert peak_memory_bytes(torch.device("cpu")) > torch.ones(2**20).nbytes


def test_a_smoothed_line_does_not_lag() -> None:
    line = [float(n) for n in range(40)]
    assert smooth(line)[5:-5] == pytest.approx(line[5:-5])
    assert smooth([1.0]) == [1.0]
    assert smooth([0.0] * 5 + [11.0] + [0.0] * 5)[5] == pytest.approx(1.0)
    # a fiftieth of a long run
    assert smooth([0.0] * 1000 + [1.0] * 1000)[1020] == 1.0 > smooth([0.0] * 1000 + [1.0] * 1000)[1019]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (512, "512"), (1.5e6, "1.5M"), (3e-4, "3e-4"), (2.5e-5, "2.5e-5"), (0.05, "0.05")]
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert short(number) == text
