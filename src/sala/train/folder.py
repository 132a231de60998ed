"""A run on disk: what it is, where it stands, what it has measured. The same command again goes on from here."""

import dataclasses
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from sala.errors import CheckpointError, DiskError, InputError, RecipeError, SalaError
from sala.recipe import Recipe, load_recipe
from sala.train.batches import Feed
from sala.train.checkpoint import Checkpoints, Saved, newest_facts
from sala.train.loop import NonFiniteError, Observer, Progress
from sala.train.parallel import ONE_PROCESS, World
from sala.train.record import METRICS, Record, require_wandb, write_whole
from sala.train.start import START, require_same_start
from sala.train.weights import remove_files

FINAL = "final"
RECIPE, MEASURED, CHECKPOINTS = "recipe.yaml", "measured", "checkpoints"

# how a recipe is run, not what comes out: these may change from one start of a run to the next
HOW = ("mesh", "compile")
HOW_OF_STAGE = ("mesh", "micro_batch", "activation_checkpointing")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run is kept.

    save_every: steps between two checkpoints of a stage; None: `save_minutes` of time. The end of a stage is always saved.
    keep: checkpoints that stay. resume: which checkpoint an interrupted run goes on from. wandb_project: see `Record`.
    """

    save_every: int | None = None
    save_minutes: float = 15.0
    keep: int = 2
    resume: Literal["newest", "previous"] = "newest"
    wandb_project: str | None = None


DEFAULTS = RunOptions()


class Interrupted(SalaError):
    """A signal came; the run is saved, and the same command goes on."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


class Finished(InputError):
    """The run is finished: nothing is left to do."""

    exit_code = 0


class Measured:
    """What a run has measured or decided (`sala.convert.Remember`): a JSON file each, shared by all ranks.

    folder: None keeps nothing. between: called by all ranks between measurements; may raise to stop there.
    """

    def __init__(self, folder: Path | None, world: World, between: Callable[[], None] = lambda: None):
        self.folder, self.world, self.between = folder, world, between

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result of `compute`: computed once in the life of a run, on rank 0, the same on all ranks."""
        return self.world.on_main(lambda: self._recall(name, compute))

    def each(self, name: str, count: int, compute: Callable[[int], Any]) -> list[Any]:
        """Return the results for 0 to count - 1: each computed once in the life of a run, shared out over the ranks."""
        names = [f"{name}-{index:04d}" for index in range(count)]
        missing = self.world.agree([i for i in range(count) if not self._has(names[i])])
        results: dict[int, Any] = {}
        for turn in range(0, len(missing), self.world.ranks):
            failure = None
            for i in missing[turn : turn + self.world.ranks][self.world.rank :][:1]:
                try:
                    results[i] = self._recall(names[i], partial(compute, i))
                except DiskError as error:
                    failure = error
            for one in self.world.gather(failure):
                if one is not None:
                    raise one
            self.between()
        for others in self.world.gather(results):
            results |= others
        # those of an earlier start may lie on rank 0's disk only
        return self.world.on_main(
            lambda: [results[i] if i in results else self._recall(names[i], partial(compute, i)) for i in range(count)]
        )

    def put(self, name: str, value: Any) -> None:
        """Write down a result, or another in its place."""
        path = self._path(name)
        if path is not None:
            self.world.on_main(lambda: write_whole(path, f"{json.dumps(value)}\n".encode()))

    def known(self, name: str) -> Any:
        """Return a result that is there already, or None."""
        return self._recall(name, lambda: None) if self._has(name) else None

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.json"

    def _has(self, name: str) -> bool:
        path = self._path(name)
        return path is not None and path.is_file()

    def _recall(self, name: str, compute: Callable[[], Any]) -> Any:
        path = self._path(name)
        if path is not None and path.is_file():
            try:
                return json.loads(path.read_bytes())
            except ValueError as error:
                raise InputError(
                    f"{path} is damaged ({error}); delete it, and the same command makes it again"
                ) from error
        # as JSON gives it back, so that the first start sees what a later one will
        text = json.dumps(compute())
        if path is not None:
            write_whole(path, f"{text}\n".encode())
        return json.loads(text)


class RunFolder:
    """The folder of one run, open for as long as `with` lasts.

    start: what the run starts from besides its recipe (`start_of`).
    finished: the last steps of the stages before the one that goes on now.

    A DiskError that leaves `with` says from where the run goes on; all ranks have met it together.

    Raises:
        Finished: the same run is there, and finished. Nothing has been changed.
        InputError: the folder is not that of a run, or the run started from something else.
        RecipeError: the run that is there has another recipe.
        CheckpointError: another process is at it; or see `Checkpoints.newest`.
        DiskError: it cannot be written.
    """

    def __init__(
        self, path: Path, recipe: Recipe, start: Mapping[str, Any], world: World, options: RunOptions = DEFAULTS
    ):
        self.path, self.recipe, self.world, self.options = path, recipe, world, options
        world.on_main(lambda: _require_own(path, recipe, start))
        self.checkpoints = Checkpoints(path / CHECKPOINTS, keep=options.keep)
        # what is asked for in vain leaves no folder
        self.checkpoints.require(options.resume)
        if options.wandb_project is not None:
            world.on_main(require_wandb)
        self.checkpoints.claim()
        world.on_main(lambda: _settle(path, recipe, start))
        self.signals = _Signals()
        self.measured = Measured(path / MEASURED, world, self._require_no_signal)
        self.saved: Saved | None = self.checkpoints.newest(options.resume)
        facts: Mapping[str, Any] = {"finished": []} if self.saved is None else self.saved.facts
        self.finished = [progress_of(values) for values in facts["finished"]]
        self.record: Record | None = None
        self.unwritten: DiskError | None = None
        try:
            there = self.measured.known(START)
            # sources of stages that have not begun may be others by now
            self.measured.put(START, start if there is None else there | {"data": start["data"]})
            world.on_main(self._open_record)
        except DiskError as error:
            raise self._with_advice(error) from error

    def _open_record(self) -> None:
        self.record = Record(
            self.path,
            config=self.recipe.resolved,
            history=b"" if self.saved is None else (self.saved.folder / METRICS).read_bytes(),
            wandb_project=self.options.wandb_project,
        )

    def _with_advice(self, error: DiskError) -> DiskError:
        facts = newest_facts(self.path / CHECKPOINTS)
        where = (
            "from the beginning"
            if facts is None
            else "after step {step} of stage {stage!r}".format(**facts["progress"])
        )
        return DiskError(f"{error}; once that is put right, the same command goes on {where}")

    def _require_no_signal(self) -> None:
        """Raise Interrupted on all ranks when a signal came to one."""
        if number := int(max(self.world.gather(self.signals.number))):
            raise Interrupted(
                f"stopped between two measurements, all kept in {self.path}; the same command goes on from there",
                number,
            )

    def __enter__(self) -> Self:
        self.signals.watch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.signals.leave()
        if self.record is not None:
            self.record.close()
        if isinstance(error, NonFiniteError | DiskError):
            # all ranks stop at it together, perhaps while a checkpoint from before it is being written
            try:
                self.checkpoints.wait()
            except DiskError as later:
                error = later
        if isinstance(error, DiskError):
            raise self._with_advice(error) from error

    def recording(self, observer: Observer) -> Observer:
        """Return an observer that also writes the record."""

        def note(progress: Progress) -> None:
            if self.record is not None:
                try:
                    self.record(progress)
                except DiskError as error:
                    # raised when all ranks hear of it, after the step
                    self.unwritten = error
            observer(progress)

        return note

    def keeper(self, stage_index: int) -> "StageKeeper":
        return StageKeeper(self, stage_index)


class StageKeeper:
    """Saves one stage, and puts it back where it was left."""

    def __init__(self, folder: RunFolder, index: int):
        self.folder, self.index = folder, index
        self.before = sum(stage.steps for stage in folder.recipe.stages[:index])
        self._saved_at = time.monotonic()

    def restore(self, state: dict[str, Any], feed: Feed) -> Progress | None:
        """See `sala.train.loop.Keeper`."""
        saved = self.folder.saved
        if saved is None or saved.facts["stage"] != self.index:
            return None
        self.folder.checkpoints.load(saved, state)
        feed.load_state_dict(saved.facts["feed"])
        progress = progress_of(saved.facts["progress"])
        if progress.step == progress.steps:
            self.folder.finished.append(progress)
        return progress

    def after(self, progress: Progress, state: Callable[[], dict[str, Any]], feed: Feed) -> None:
        """See `sala.train.loop.Keeper`. Raises Interrupted once everything is saved, when a signal came.

        Raises DiskError when this step could not be written down: then it is not saved.
        """
        folder, options = self.folder, self.folder.options
        late = options.save_every is None and time.monotonic() - self._saved_at >= 60 * options.save_minutes
        stopping, due, unwritten = folder.world.sum(
            [folder.signals.number, folder.world.main and late, folder.unwritten is not None]
        )
        if unwritten:
            raise folder.world.agree(folder.unwritten)
        done = progress.step == progress.steps
        if options.save_every is not None and progress.step % options.save_every == 0:
            due = True
        if not (stopping or due or done):
            folder.checkpoints.poll()
            return
        facts = {
            "stage": self.index,
            "progress": dataclasses.asdict(progress),
            "finished": [dataclasses.asdict(earlier) for earlier in folder.finished],
            "feed": feed.state_dict(),
        }
        history = {} if folder.record is None else {METRICS: folder.record.history}
        folder.checkpoints.save(self.before + progress.step, state(), facts, history)
        self._saved_at = time.monotonic()
        if stopping or done:
            folder.checkpoints.wait()
        if done:
            folder.finished.append(progress)
        if stopping:
            raise Interrupted(
                f"stopped after step {progress.step} of stage {progress.stage!r}, saved in {folder.path}; the same command "
                "goes on from there",
                int(max(folder.world.gather(folder.signals.number))),
            )


class _Signals:
    """SIGTERM and Ctrl-C are noted and answered after the step; a second one, later, ends the process as usual.

    torchrun passes on to every process what a scheduler may have sent to it too: at once, that is the same signal.
    """

    WATCHED = (signal.SIGTERM, signal.SIGINT)
    AT_ONCE_S = 3.0

    def __init__(self) -> None:
        self.number = 0
        self._noted_at = 0.0
        self._own: dict[int, Any] = {}

    def watch(self) -> None:
        # only the main thread may; a run in another one is stopped by its caller
        if threading.current_thread() is threading.main_thread():
            self._own = {number: signal.signal(number, self._note) for number in self.WATCHED}

    def leave(self) -> None:
        for number, handler in self._own.items():
            signal.signal(number, handler)
        self._own = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._noted_at = number, time.monotonic()
        elif time.monotonic() - self._noted_at > self.AT_ONCE_S:
            self.leave()
            signal.raise_signal(number)


def progress_of(values: Mapping[str, Any]) -> Progress:
    """Return a step as a checkpoint's facts have it."""
    return Progress(**{**values, "layer_errors": tuple(values["layer_errors"])})


def _require_own(path: Path, recipe: Recipe, start: Mapping[str, Any]) -> None:
    """Require that `path` is new, or the run of `recipe` from `start` that can go on."""
    if path.exists() and not path.is_dir():
        raise InputError(f"{str(path)!r} is a file; expected a new folder")
    if not path.exists() or not _begun(path):
        return
    if not (path / RECIPE).is_file():
        raise InputError(f"{str(path)!r} exists and is no folder of a run; expected a new folder")
    recorded = load_recipe(path / RECIPE)
    begun = _stages_begun(path, recorded)
    _require_same(_what(recorded, begun), _what(recipe, begun), path)
    if (there := Measured(path / MEASURED, ONE_PROCESS).known(START)) is not None:
        unread = recipe.sources.keys() - _sources_read(recipe, begun)
        data = {name: description for name, description in start["data"].items() if name not in unread}
        require_same_start(there, {**start, "data": data}, path)
    if (path / FINAL).exists():
        raise Finished(f"the run in {str(path)!r} is finished: its model is {str(path / FINAL)!r}")


def _begun(path: Path) -> bool:
    """Return whether a folder has more than a run that was killed in its first moments left in it."""
    left = [entry.name for entry in path.iterdir() if not entry.name.startswith(f".{RECIPE}.")]
    return bool(left) and not (left == [CHECKPOINTS] and not any((path / CHECKPOINTS).glob("step-*")))


def _settle(path: Path, recipe: Recipe, start: Mapping[str, Any]) -> None:
    """Write down how the run goes on, and remove what killed processes left half-written."""
    # another process may have begun it before this one claimed it
    _require_own(path, recipe, start)
    for left in [*path.glob(f".{RECIPE}.*"), *path.glob(f".{METRICS}.*"), *(path / MEASURED).glob(".*.json.*")]:
        left.unlink()
    for left in path.glob(f".{FINAL}.*"):
        shutil.rmtree(left)
    remove_files(path)
    write_whole(path / RECIPE, recipe.text.encode())


def _stages_begun(path: Path, recipe: Recipe) -> int:
    """Return how many stages of a run have begun, at least one: up to that of its newest checkpoint. The others may change."""
    try:
        facts = newest_facts(path / CHECKPOINTS)
    except CheckpointError:
        # what it had begun is not known; whoever reads the checkpoint says what is wrong with it
        facts = {"stage": len(recipe.stages) - 1}
    if (path / FINAL).exists():
        return len(recipe.stages)
    return 1 if facts is None else facts["stage"] + 1


def _sources_read(recipe: Recipe, begun: int) -> set[str]:
    return {name for stage in recipe.stages[:begun] for name in stage.data}


def _what(recipe: Recipe, begun: int) -> dict[str, Any]:
    """Return a recipe as plain values, without how it is run and without the stages that have not begun."""
    resolved = recipe.resolved
    what = {name: value for name, value in resolved.items() if name not in HOW}
    what["stages"] = [
        {name: value for name, value in stage.items() if name not in HOW_OF_STAGE}
        for stage in resolved["stages"][:begun]
    ]
    read = _sources_read(recipe, begun)
    what["sources"] = {name: source for name, source in resolved["sources"].items() if name in read}
    return what


def _require_same(there: Any, given: Any, path: Path, place: str = "") -> None:
    if isinstance(there, dict) and isinstance(given, dict):
        for name in there | given:
            _require_same(there.get(name), given.get(name), path, f"{place}.{name}" if place else str(name))
    elif isinstance(there, list) and isinstance(given, list) and len(there) == len(given):
        for index, (left, right) in enumerate(zip(there, given, strict=True)):
            _require_same(left, right, path, f"{place}.{index}")
    elif isinstance(there, list) and isinstance(given, list):
        _require_same(len(there), len(given), path, f"the number of {place}")
    elif there != given:
        raise RecipeError(
            f"the run in {str(path)!r} has {place} = {there!r}, this recipe {given!r}; expected its own recipe "
            f"({path / RECIPE}), or a new folder"
        )
