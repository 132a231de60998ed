"""Checkpoints of a run: staged at once, written beside the training, published by one rename, verified before use."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from sala.errors import CheckpointError, DiskError, SalaError
from sala.runs.manifest import (
    FORMAT,
    MANIFEST,
    NAME,
    checksum,
    order,
    published,
    read_manifest,
    sync_folder,
    verify,
    write_manifest,
)
from sala.train.parallel import ONE_PROCESS, World

LOCK, WRITING, DELETED = ".lock", ".writing-", ".deleted-"

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Saved:
    """A complete checkpoint on disk, and the JSON object that was saved with it."""

    folder: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        return order(self.folder)[0]


class _Staging(DefaultSavePlanner):
    """Plans a save, and holds the copies in CPU memory that are written: of a rank's own part, each until it is written."""

    def __init__(self) -> None:
        # keys are flat already
        super().__init__(flatten_state_dict=False)
        self._copies: dict[MetadataIndex, Any] = {}

    def stage(self, plan: SavePlan) -> None:
        resolve = super().resolve_data
        self._copies = {item.index: resolve(item).detach().to("cpu", copy=True) for item in plan.items}  # type: ignore[union-attr]
        # what was copied must not be kept alive
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._copies.pop(write_item.index)


# what a rank has written: for the metadata, and for the manifest
_Written = tuple[list[WriteResult], dict[str, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class _Writing:
    """A checkpoint under way."""

    step: int
    folder: Path
    final: Path
    facts: str
    writer: FileSystemWriter
    metadata: Metadata
    written: Future[_Written]


class Checkpoints:
    """The checkpoints of one run: `folder/step-0000001200` and so on, in torch's distributed format.

    Every rank makes one and calls each method at the same point, with the same arguments but for the tensors ("collective").
    Ranks talk on the calling thread only, and see one file system.

    A checkpoint is written under a hidden name, checksummed, and renamed when it is complete: a
    folder with a visible name is a complete checkpoint, whenever the run was killed. Reading changes nothing, so another
    process may read while a run writes.

    A state is nested dicts of tensors and DTensors, on any device. A plain tensor counts as the same on all ranks, and one
    rank writes it: what differs by rank needs a key by rank. Numbers and text go into `facts`.

    Args:
        world: the processes of the run.
        keep: how many checkpoints stay, the newest.
        asynchronous: write in a thread, beside the training; else `save` returns when the checkpoint is complete.
    """

    def __init__(self, folder: Path, *, world: World = ONE_PROCESS, keep: int = 2, asynchronous: bool = True):
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected 1 or more")
        self.world = world
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: _Writing | None = None
        self._deletion: Future[None] | None = None
        self._lock: int | None = None
        # the step that this run has last saved or loaded
        self._last_step: int | None = None
        # what this rank wants to write, and what all agreed upon: the same in every save of a stage
        self._wanted: SavePlan | None = None
        self._plan, self._metadata = SavePlan([]), Metadata({})

    def claim(self) -> None:
        """Lock the folder for this process, and remove what killed runs left. Collective.

        `save` does it too; a run that begins with it fails at once where it could not save later.

        Raises:
            CheckpointError: another process saves there.
            DiskError: the folder cannot be written.
        """
        self._first(f"{self.folder} cannot be written", self._claim)

    def save(
        self, step: int, state: Mapping[str, Any], facts: Mapping[str, Any], files: Mapping[str, bytes] | None = None
    ) -> None:
        """Start to write a checkpoint; the tensors may change as soon as this returns. Collective.

        Finishes the save before, if it is still under way. The same step may be saved again: the later one counts. A save
        that follows a resume from an older checkpoint removes, when it is finished, the later ones of that history.

        Args:
            facts: a JSON object (rank 0's is kept).
            files: further files, by name (rank 0's are written).

        Raises:
            CheckpointError: the folder is in use, or holds later steps of a run that was not resumed.
            DiskError: the folder cannot be written, or the save before has failed.
            TypeError: the state holds something that is not a tensor, or the facts something that JSON does not know.
            ValueError: a step before the last one, or two tensors of one name.
        """
        self.wait()
        if self._last_step is not None and step < self._last_step:
            raise ValueError(f"step {step} is saved after step {self._last_step}")
        tensors, text = _flat(state), json.dumps(facts)
        name = self._first(f"a checkpoint of step {step} cannot be started", partial(self._start, step))
        folder = self.folder / f"{WRITING}{name}"
        planner, writer = _Staging(), FileSystemWriter(folder, per_thread_copy_ahead=0)
        plan = self._agree_on_plan(tensors, planner, writer)
        self._each(f"a checkpoint of step {step} cannot be started", partial(planner.stage, plan))
        own = (files or {}) if self.world.main else {}
        written = self._thread.submit(_write, folder, self.world.rank, writer, plan, planner, own)
        self._writing = _Writing(step, folder, self.folder / name, text, writer, self._metadata, written)
        if not self.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Publish the checkpoint under way if every rank has written its part; cheap. Collective.

        Raises:
            DiskError: it could not be written, on any rank. It is removed; those before it are untouched.
        """
        if self._writing is not None and self.world.all(self._writing.written.done()):
            self._finish(self._writing)

    def wait(self) -> None:
        """Return when the checkpoint under way is published and old ones are deleted. Collective; errors as in `poll`."""
        if self._writing is not None:
            wait([self._writing.written])
            self._finish(self._writing)
        deletion, self._deletion = self._deletion, None
        self._first(f"old checkpoints in {self.folder} cannot be deleted", lambda: deletion and deletion.result())

    def require(self, which: Literal["newest", "previous"]) -> list[Path]:
        """Return the complete checkpoints from the oldest to the newest, none of them verified. Collective.

        Raises:
            CheckpointError: "previous" is asked for and there is no checkpoint before the newest.
        """
        found = self._first(f"{self.folder} cannot be read", partial(published, self.folder))
        if which == "previous" and len(found) < 2:
            there = f"only {found[0].name}" if found else "no checkpoint"
            raise CheckpointError(f"--resume previous: {self.folder} holds {there}, and none before it")
        return found

    def newest(self, which: Literal["newest", "previous"] = "newest") -> Saved | None:
        """Return the newest checkpoint, or the one before it, with every file verified; None when there is none. Collective.

        Raises:
            CheckpointError: its files are not those that were written, or of another format; or "previous" is asked for
                and there is no checkpoint before the newest.
            DiskError: the system does not let us read them.
        """
        found = self.require(which)
        if not found:
            return None
        *older, folder = found if which == "newest" else found[:-1]
        try:
            what = f"{folder} cannot be resumed from"
            manifest = self._first(what, partial(read_manifest, folder))
            self._each(what, partial(verify, folder, manifest["files"], self.world.rank, self.world.ranks))
        except (CheckpointError, DiskError) as error:
            if not older:
                advice = "there is no checkpoint before it"
            elif which == "newest":
                advice = f"--resume previous would use {older[-1].name}"
            else:
                advice = f"with {folder.name} deleted, --resume previous would use {older[-1].name}"
            raise type(error)(f"{error}; {advice}") from error
        return Saved(folder, manifest["facts"])

    def load(self, saved: Saved, state: Mapping[str, Any]) -> None:
        """Read a checkpoint into the tensors of `state`, in place, bit by bit; on any number of ranks, any mesh. Collective.

        Raises:
            CheckpointError: a tensor that the checkpoint does not have, one that no rank takes, or one of another shape
                or dtype. Nothing is read then.
            DiskError: the system does not let us read it.
        """
        tensors = _flat(state)
        reader, planner = FileSystemReader(saved.folder), DefaultLoadPlanner(flatten_state_dict=False)

        def compare() -> set[str]:
            metadata = reader.read_metadata()
            _require_same_tensors(metadata, tensors)
            planner.set_up_planner(tensors, metadata, is_coordinator=self.world.main)
            reader.set_up_storage_reader(metadata, is_coordinator=self.world.main)
            return metadata.state_dict_metadata.keys() - tensors.keys()

        def read() -> None:
            plan = reader.prepare_local_plan(planner.create_local_plan())
            reader.read_data(planner.finish_plan(plan), planner).wait()

        what = f"{saved.folder} cannot be loaded"
        unread = set.intersection(*self.world.gather(self._each(what, compare)))
        if unread:
            raise CheckpointError(f"{what}: it has {_listed(unread)}, which nothing here takes")
        self._each(what, read)
        self._last_step = saved.step

    def _each(self, what: str, work: Callable[[], Result]) -> Result:
        """As `World.each`, with errors that say `what` failed: a DiskError of the system, or a CheckpointError."""
        return self.world.each(partial(self._named, what, work))

    def _first(self, what: str, work: Callable[[], Result]) -> Result:
        """As `World.first`, with errors as in `_each`."""
        return self.world.first(partial(self._named, what, work))

    def _named(self, what: str, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except Exception as error:
            kind, message = _told(error)
            where = f" on rank {self.world.rank}" if self.world.ranks > 1 else ""
            raise kind(f"{what}{where}: {message}") from error

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = _lock(self.folder / LOCK)
        for left in [*self.folder.glob(f"{WRITING}*"), *self.folder.glob(f"{DELETED}*")]:
            shutil.rmtree(left)

    def _start(self, step: int) -> str:
        """Make room for a checkpoint and return the name that it will have."""
        self._claim()
        there = published(self.folder)
        if self._last_step is None and there and order(there[-1])[0] > step:
            raise CheckpointError(
                f"{there[-1]} is later, and this run was not resumed; resume it, or name another folder"
            )
        times = [order(path)[1] for path in there if order(path)[0] == step]
        name = f"step-{step:010}" + (f"-{times[0] + 1}" if times else "")
        (self.folder / f"{WRITING}{name}").mkdir()
        return name

    def _agree_on_plan(self, tensors: dict[str, Tensor], planner: _Staging, writer: FileSystemWriter) -> SavePlan:
        """Return what this rank writes: replicas are written once."""
        first = self.world.main
        planner.set_up_planner(tensors, writer.storage_meta(), is_coordinator=first)
        writer.set_up_storage_writer(first)
        wanted = writer.prepare_local_plan(planner.create_local_plan())
        if not self.world.all(wanted == self._wanted):
            plans, self._metadata = planner.create_global_plan(self.world.gather(wanted))
            self._wanted, self._plan = wanted, writer.prepare_global_plan(plans)[self.world.rank]
        return planner.finish_plan(self._plan)

    def _finish(self, writing: _Writing) -> None:
        self._writing = None
        what = f"the checkpoint of step {writing.step} could not be written to {self.folder}"
        try:
            written = self.world.gather(self._each(what, writing.written.result))
            self._first(what, partial(self._publish, writing, written))
        except (CheckpointError, DiskError):
            # the next save, of this run or another, removes what cannot be removed now
            self._first(what, partial(shutil.rmtree, writing.folder, ignore_errors=True))
            raise
        self._last_step = writing.step

    def _publish(self, writing: _Writing, written: list[_Written]) -> None:
        """Complete a checkpoint that every rank has written its part of, rename it, and delete what it replaces."""
        writer, folder = writing.writer, writing.folder
        writer.finish(writing.metadata, [results for results, _ in written])
        files = {name: facts for _, part in written for name, facts in part.items()}
        for path in sorted(folder.iterdir()):
            if path.name not in files:
                files[path.name] = checksum(path)
        write_manifest(folder / MANIFEST, {"format": FORMAT, "facts": json.loads(writing.facts), "files": files})
        # later steps are a history that this run has left by resuming before them: they must never be newest again
        later = [path for path in published(self.folder) if order(path)[0] > writing.step]
        deleted = [self._set_aside(path) for path in later]
        folder.rename(writing.final)
        sync_folder(self.folder)
        kept = {path.name for path in published(self.folder)[-self.keep :]}
        old = [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name) and path.name not in kept]
        deleted += [self._set_aside(path) for path in old]
        self._deletion = self._thread.submit(_delete, deleted)

    def _set_aside(self, path: Path) -> Path:
        return path.rename(path.with_name(f"{DELETED}{path.name}"))


def _told(error: BaseException) -> tuple[type[SalaError], str]:
    """Return the kind of an error and what it says in one line, with its class where the text would not say enough."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError | CheckpointError):
        # torch's file format meets a full disk with an error about positions, which hides the system's
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(cause or error).split())
    kind = DiskError if isinstance(cause, OSError) else CheckpointError
    return kind, text if cause is not None else f"{type(error).__name__}: {text}"


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dicts by their dotted names."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            part = _flat(value, f"{name}.")
        elif isinstance(value, Tensor) and not value.is_meta:
            part = {name: value}
        else:
            kind = "without numbers (meta)" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TypeError(f"{name} is {kind}; a state holds tensors, and anything else goes into the facts")
        if twice := tensors.keys() & part.keys():
            raise ValueError(f"two tensors are called {min(twice)}")
        tensors |= part
    return tensors


def _require_same_tensors(metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    saved: dict[str, Any] = metadata.state_dict_metadata
    if missing := tensors.keys() - saved.keys():
        raise CheckpointError(f"it does not have {_listed(missing)}")
    for name, tensor in tensors.items():
        shape, dtype = tuple(saved[name].size), saved[name].properties.dtype
        if shape != tuple(tensor.shape) or dtype != tensor.dtype:
            raise CheckpointError(
                f"its {name} is {dtype} of shape {shape}; here it is {tensor.dtype} of {tuple(tensor.shape)}"
            )


def _listed(names: set[str]) -> str:
    """Return the first names and how many more there are."""
    shown, more = sorted(names)[:3], len(names) - 3
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _write(
    folder: Path, rank: int, writer: FileSystemWriter, plan: SavePlan, planner: _Staging, files: Mapping[str, bytes]
) -> _Written:
    """Write what this rank writes; return what the metadata needs, and the files with their checksums."""
    results = writer.write_data(plan, planner).wait()
    for name, content in files.items():
        with (folder / name).open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    paths = [*sorted(folder.glob(f"__{rank}_*")), *(folder / name for name in files)]
    return results, {path.name: checksum(path) for path in paths}


def _lock(path: Path) -> int:
    """Lock a file for this process until it ends; CheckpointError if another process has."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(f"{path.parent} is in use by another process; end that process first") from None
    return descriptor


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)
