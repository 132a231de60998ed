"""A run on disk: what it is, where it stands, what it has measured. The same command again goes on from here."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sala.errors import DiskError
from sala.recipe import Recipe
from sala.runs.checkpoint import Checkpoints, Saved
from sala.runs.identity import CHECKPOINTS, FINAL, MEASURED, RECIPE, require_own
from sala.runs.manifest import newest_facts
from sala.runs.measured import Measured
from sala.runs.record import METRICS, Record, require_wandb, write_whole
from sala.runs.signals import Interrupted, Signals
from sala.runs.start import START
from sala.train.batches import Feed
from sala.train.loop import NonFiniteError, Observer, Progress
from sala.train.parallel import World
from sala.train.weights import remove_files


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
        world.first(lambda: require_own(path, recipe, start))
        self.checkpoints = Checkpoints(path / CHECKPOINTS, world=world, keep=options.keep)
        # what is asked for in vain leaves no folder
        self.checkpoints.require(options.resume)
        if options.wandb_project is not None:
            world.first(require_wandb)
        self.checkpoints.claim()
        world.first(lambda: _settle(path, recipe, start))
        self.signals = Signals()
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
            world.first(self._open_record)
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

    def saver(self, stage_index: int) -> "StageSaver":
        return StageSaver(self, stage_index)


class StageSaver:
    """Saves one stage, and puts it back where it was left."""

    def __init__(self, folder: RunFolder, index: int):
        self.folder, self.index = folder, index
        self.before = sum(stage.steps for stage in folder.recipe.stages[:index])
        self._saved_at = time.monotonic()

    def restore(self, state: dict[str, Any], feed: Feed) -> Progress | None:
        """See `sala.train.loop.Saver`."""
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
        """See `sala.train.loop.Saver`. Raises Interrupted once everything is saved, when a signal came.

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


def progress_of(values: Mapping[str, Any]) -> Progress:
    """Return a step as a checkpoint's facts have it."""
    return Progress(**{**values, "layer_errors": tuple(values["layer_errors"])})


def _settle(path: Path, recipe: Recipe, start: Mapping[str, Any]) -> None:
    """Write down how the run goes on, and remove what killed processes left half-written."""
    # another process may have begun it before this one claimed it
    require_own(path, recipe, start)
    for left in [*path.glob(f".{RECIPE}.*"), *path.glob(f".{METRICS}.*"), *(path / MEASURED).glob(".*.json.*")]:
        left.unlink()
    for left in path.glob(f".{FINAL}.*"):
        shutil.rmtree(left)
    remove_files(path)
    write_whole(path / RECIPE, recipe.text.encode())
