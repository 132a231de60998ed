"""The model of a run that is under way or interrupted, as a Hugging Face folder. The run is only read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sala.convert.choose import Scorers
from sala.data import load_tokenizer
from sala.errors import InputError, SalaError
from sala.model.checkpoint import find_checkpoint, output_folder
from sala.model.families import load_model
from sala.recipe import Mesh, Recipe, Stage, load_recipe
from sala.runs.checkpoint import Checkpoints, Saved
from sala.runs.final import write_final
from sala.runs.folder import progress_of
from sala.runs.identity import CHECKPOINTS, MEASURED, RECIPE
from sala.runs.measured import Measured
from sala.runs.record import METRICS, rows_of
from sala.runs.run import make_model, new_model
from sala.runs.stages import StageRunner, ignore
from sala.runs.start import START, Origin, require_same_start, start_of
from sala.train.batches import Feed, StepFeed, WindowBatch
from sala.train.loop import Progress
from sala.train.parallel import ONE_PROCESS


class _Known(Measured):
    """What a run has measured and decided; nothing is measured here."""

    def _recall(self, name: str, compute: Callable[[], Any]) -> Any:
        if not self._has(name):
            raise InputError(f"{self._path(name)} is missing; expected the whole folder of a run")
        return super()._recall(name, compute)


@dataclass(frozen=True)
class _Described:
    """What a run drew from, by its description alone: everything that it was measured on is known."""

    descriptions: dict[str, str]

    def feed(self, stage: Stage, seed: int, rank: int = 0, ranks: int = 1) -> Feed:
        nothing = torch.zeros(0, stage.length, dtype=torch.int64)
        return StepFeed(lambda step: WindowBatch(nothing, nothing.float(), ()))

    def describe(self) -> dict[str, str]:
        return self.descriptions


@dataclass(frozen=True)
class _Reader:
    """Puts a stage back where a checkpoint has it, in a stage that ends there."""

    checkpoints: Checkpoints
    saved: Saved

    @property
    def finished(self) -> list[Progress]:
        return [progress_of(values) for values in self.saved.facts["finished"]]

    def saver(self, index: int) -> "_Reader":
        return self

    def restore(self, state: dict[str, Any], feed: Feed) -> Progress:
        self.checkpoints.load(self.saved, state)
        return progress_of(self.saved.facts["progress"])

    def after(self, progress: Progress, state: Callable[[], dict[str, Any]], feed: Feed) -> None:
        raise AssertionError("an export takes no step")


@contextmanager
def _while_it_is_there(checkpoint: Path | None) -> Iterator[None]:
    """Say so when a run that goes on has replaced the checkpoint that is being read."""
    try:
        yield
    except (OSError, SalaError) as error:
        if checkpoint is None or checkpoint.is_dir():
            raise
        raise InputError(
            f"the run has replaced {checkpoint} while it was read; repeat the command, or a run that "
            "keeps more checkpoints (--keep)"
        ) from error


def export(run: Path, out: Path, *, resume: Literal["newest", "previous"] = "newest") -> Progress:
    """Write the model of a run's newest checkpoint into the new folder `out`, and return the step that it is of.

    It takes one process, whatever the number of ranks that saved, and goes through what a run does that goes on from there:
    a conversion is made again from what the run has measured.

    Args:
        resume: which checkpoint.

    Raises:
        InputError: `run` is no folder of a run, has nothing saved, has no hybrid yet, or has replaced the checkpoint
            meanwhile; `out` exists; or the checkpoint or tokenizer that the run started from is not there any more.
        CheckpointError: the checkpoint is damaged (see `Checkpoints.newest`).
    """
    if not (run / RECIPE).is_file():
        raise InputError(f"{str(run)!r} is no folder of a run; expected one, such as --out of sala train")
    recipe, checkpoints = load_recipe(run / RECIPE), Checkpoints(run / CHECKPOINTS)
    published = checkpoints.require(resume)
    chosen = published[-1 if resume == "newest" else -2] if published else None
    # the folder first: what cannot be written is known before a model is made
    with output_folder(out) as folder, _while_it_is_there(chosen):
        return _export(run, folder, recipe, checkpoints, checkpoints.newest(resume))


def _export(run: Path, folder: Path, recipe: Recipe, checkpoints: Checkpoints, saved: Saved | None) -> Progress:
    if saved is None:
        raise InputError(f"the run in {str(run)!r} has saved nothing yet; wait for its first checkpoint")
    index, progress = saved.facts["stage"], progress_of(saved.facts["progress"])
    if recipe.stages[index].loss == "align":
        raise InputError(
            f"the run in {str(run)!r} is saved at step {progress.step} of stage {progress.stage!r}, before its layers are "
            "selected: there is no hybrid yet; wait for a checkpoint of the next stage"
        )
    measured = _Known(run / MEASURED, ONE_PROCESS)
    there = measured.once(START, dict)
    model, origin = _checkpoint(there["checkpoint"])
    tokenizer = load_tokenizer(there["tokenizer"]["name"])
    data = _Described(there["data"])
    require_same_start(there, start_of(model, origin, tokenizer, data), run)
    cut = _until(recipe, index, progress.step)
    runner = StageRunner(cut, data, ignore, saved=_Reader(checkpoints, saved))
    scorers = Scorers(_not_scored, _not_scored)
    trained, report = make_model(model or new_model(recipe, tokenizer), runner, scorers, measured)
    steps = list(rows_of((saved.folder / METRICS).read_bytes()))
    write_final(folder, trained, report, tokenizer, recipe, data, steps, origin)
    return progress


def _checkpoint(there: Mapping[str, Any] | None) -> tuple[Any, Origin | None]:
    if there is None:
        return None, None
    if there["name"] is None:
        raise InputError("the run was given a model without a name, which cannot be found again")
    return load_model(find_checkpoint(there["place"]), dtype="stored"), Origin.of(there["name"])


def _until(recipe: Recipe, index: int, steps: int) -> Recipe:
    """Return a recipe that ends at a step of a stage, for one process."""
    here = {"mesh": None, "activation_checkpointing": False}
    stages = [stage.model_copy(update=here) for stage in recipe.stages[: index + 1]]
    stages[-1] = stages[-1].model_copy(update={"steps": steps})
    return recipe.model_copy(update={"stages": tuple(stages), "mesh": Mesh(), "precision": "float32", "compile": "off"})


def _not_scored(model: Any) -> float:
    raise AssertionError("an export scores no candidate")
