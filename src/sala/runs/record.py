"""What a run writes about itself: a line a step, TensorBoard's event files, and Weights & Biases when asked for."""

import contextlib
import dataclasses
import io
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sala.errors import InputError, writing
from sala.train.loop import Progress

METRICS, TENSORBOARD, WANDB = "metrics.jsonl", "tensorboard", "wandb.json"
GIB = 2**30

# a step as it is read back: the fields of `Progress`
Row = Mapping[str, Any]


def scalars(row: Row) -> dict[str, float]:
    """Return what is drawn of a step, by name; what is not known of it is left out."""
    values = {
        name: row.get(name)
        for name in ("loss", "validation_loss", "learning_rate", "gradient_norm", "tokens_per_s", "mfu")
    }
    values["memory_gib"] = row["memory_bytes"] / GIB or None
    values |= {f"layer_errors/{layer:02d}": error for layer, error in enumerate(row["layer_errors"])}
    return {name: value for name, value in values.items() if value is not None}


class Record:
    """The observer that writes a run down in its folder; of many ranks one has it.

    Everything is with the system after each step: a process that is killed leaves at most half a line, a disk that is full
    leaves none. TensorBoard's file is made of `metrics.jsonl`, again at each start.

    Steps are numbered over all stages in TensorBoard ("global step") and in Weights & Biases ("global_step").

    Args:
        folder: of the run; it exists.
        config: the resolved recipe, `Recipe.resolved`.
        history: the steps from which the run goes on, as an earlier Record's `history` gave them. What the folder has of
            others is forgotten. (Weights & Biases forgets nothing: steps taken again are there twice, at the same place.)
        wandb_project: also log to this project of Weights & Biases; the run's id is kept in `wandb.json`, and a later
            Record of the same folder continues it.

    Raises:
        InputError: `wandb` is not installed, or the folder's run belongs to another project.
        DiskError: a file cannot be written, here or with a step, of which nothing stays then.
    """

    def __init__(
        self, folder: Path, *, config: Mapping[str, Any], history: bytes = b"", wandb_project: str | None = None
    ):
        self._folder = folder
        self._stage_starts = list(accumulate((stage["steps"] for stage in config["stages"]), initial=0))
        self._wandb = None if wandb_project is None else _wandb_run(folder, wandb_project, config)
        self._metrics = Appended(folder / METRICS, history)
        events = [_first_events(), *map(self._event, rows_of(history))]
        self._tensorboard = Appended(_new_event_file(folder), b"".join(events))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, progress: Progress) -> None:
        row = {"time": time.time(), **dataclasses.asdict(progress)}
        self._metrics.append(json.dumps(row).encode() + b"\n")
        self._tensorboard.append(self._event(row))
        if self._wandb is not None:
            self._wandb.log({"global_step": self._global_step(row), **scalars(row)})

    @property
    def history(self) -> bytes:
        """All steps so far: the lines of `metrics.jsonl`."""
        return (self._folder / METRICS).read_bytes()

    def _global_step(self, row: Row) -> int:
        return self._stage_starts[row["stage_index"]] + row["step"]

    def _event(self, row: Row) -> bytes:
        """Return a step as a record of an event file."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(row).items()]
        return _event_record(wall_time=row["time"], step=self._global_step(row), summary=Summary(value=values))

    def close(self) -> None:
        self._metrics.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class Appended:
    """A file that grows by whole pieces: of one that cannot be written nothing stays.

    content: what it has at first, whatever was there before.

    Raises:
        DiskError: it cannot be written.
    """

    def __init__(self, path: Path, content: bytes):
        self._path = path
        with writing(path):
            if not path.is_file() or not path.read_bytes().startswith(content):
                write_whole(path, content)
            # unbuffered: what could not be written is not tried again when the file is closed
            self._file = path.open("ab", buffering=0)
            self._file.truncate(len(content))

    def append(self, piece: bytes) -> None:
        with writing(self._path):
            size, rest = os.fstat(self._file.fileno()).st_size, piece
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(size)
                raise

    def close(self) -> None:
        self._file.close()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there in full or not at all, whenever the process is killed. Raises DiskError."""
    working = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with working.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            working.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                working.unlink()
            raise


def rows_of(lines: bytes) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON lines, up to the first line that is no whole one."""
    for line in lines.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(row, dict):
            return
        yield row


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the steps of a run so far, in order, each with the fields of `Progress`.

    Raises:
        InputError: this is no folder of a run, or of one without a step.
    """
    path = folder / METRICS
    if not path.is_file():
        what = f"no folder {str(folder)!r}" if not folder.is_dir() else f"{str(folder)!r} has no {METRICS}"
        raise InputError(f"{what}; expected the folder of a run, such as --out of sala train")
    rows = list(rows_of(path.read_bytes()))
    if not rows:
        raise InputError(f"{path} has no step yet; expected a run that has made one")
    names = {field.name for field in dataclasses.fields(Progress)}
    for row in rows:
        row.setdefault("validation_loss", None)
        if missing := names - row.keys():
            raise InputError(f"{path} lacks {', '.join(sorted(missing))}; expected a file that sala train wrote")
    return rows


def in_stages(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the steps of each stage."""
    return [list(steps) for _, steps in groupby(rows, lambda row: row["stage_index"])]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours: a fiftieth of them, at least ten; fewer at the ends.

    Neighbours of both sides, because a mean of the past alone lags behind a loss that falls.
    """
    reach = max(5, len(values) // 100)
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def short(number: float) -> str:
    """Return 1500000 as 1.5M and 0.0003 as 3e-4: decimal units, as tokens are counted."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    if not 0 < number < 0.01:
        return f"{number:.3g}"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _new_event_file(folder: Path) -> Path:
    """Make room for a run's one event file, and return its path."""
    events = folder / TENSORBOARD
    with writing(events):
        events.mkdir(exist_ok=True)
        for left in events.glob("*tfevents*"):
            left.unlink()
    # TensorBoard goes on, where it is looking on, with the file that sorts behind the one before
    return events / f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"


def _event_record(**fields: Any) -> bytes:
    """Return an event (tensorboard's event.proto) as a record of an event file."""
    # nothing that makes a plan or a plot needs it
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(**fields).SerializeToString())
    return buffer.getvalue()


def _first_events() -> bytes:
    """Return what an event file begins with: its version, and that all steps known before are forgotten."""
    from tensorboard.compat.proto.event_pb2 import SessionLog

    started = SessionLog(status=SessionLog.START)
    now = time.time()
    return _event_record(wall_time=now, file_version="brain.Event:2") + _event_record(
        wall_time=now, session_log=started
    )


def require_wandb() -> None:
    """Raise InputError when the package `wandb` is not installed."""
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise InputError("--wandb needs the package `wandb`: pip install 'sala[wandb]'") from error


def _wandb_run(folder: Path, project: str, config: Mapping[str, Any]) -> Any:
    require_wandb()
    import wandb

    path = folder / WANDB
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"project": project, "id": None}
    if known["project"] != project:
        raise InputError(f"--wandb {project}: this run is in project {known['project']!r}, which would be right")
    run = wandb.init(
        project=project,
        id=known["id"],
        resume="allow",
        name=folder.resolve().name,
        config=dict(config),
        dir=str(folder),
    )
    # its own count of steps cannot go back to where a run is resumed
    run.define_metric("global_step")
    run.define_metric("*", step_metric="global_step")
    write_whole(path, json.dumps({"project": project, "id": run.id}).encode() + b"\n")
    return run
