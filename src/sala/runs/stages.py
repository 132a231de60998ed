"""The stages of a recipe, run one by one: data, seed, optimizer, mesh and checkpoints of each."""

import gc
from dataclasses import dataclass
from typing import Any, Protocol

from sala.errors import RecipeError
from sala.recipe import LearningRate, Recipe, Stage
from sala.runs.checks import require_feeds
from sala.train.batches import Data, Feed, HeldOut
from sala.train.cards import peak_flops
from sala.train.flops import Networks, model_flops
from sala.train.loop import Observer, Progress, Saver, run_stage
from sala.train.parallel import ALONE, ONE_PROCESS, Parallel, World
from sala.train.passes import MicroBatch, micro_batch_of
from sala.train.weights import PRIVATE, Weights

# stages of one run draw different data: each has a seed of its own
SEEDS_PER_RUN = 1000


def ignore(progress: Progress) -> None:
    """The observer that shows nothing."""


class SavedStages(Protocol):
    """The stages of a run that are done, by their last steps, and who puts back the one after them."""

    @property
    def finished(self) -> list[Progress]: ...

    def saver(self, index: int) -> Saver: ...


@dataclass(frozen=True)
class StageRunner:
    """Runs the stages of one recipe: data, seed, optimizer, mesh and saver of each."""

    recipe: Recipe
    data: Data
    observer: Observer
    world: World = ONE_PROCESS
    saved: SavedStages | None = None
    weights: Weights = PRIVATE
    held_out: Data | None = None

    def check(self) -> None:
        """Raise RecipeError for what a stage cannot have, before anything is trained."""
        parallels = [self._parallel(index) for index in range(len(self.recipe.stages))]
        require_feeds(self.recipe, self.data, [parallel.mesh.data_parallel for parallel in parallels])
        for parallel in parallels:
            self._held_out(parallel)

    def __call__(self, model: Any, stage: Stage, *, teacher: Any = None) -> Progress:
        index = self.recipe.stages.index(stage)
        if self.saved is not None and index < len(self.saved.finished):
            # a later stage's checkpoint has every parameter that this one left behind
            return self.saved.finished[index]
        parallel = self._parallel(index)
        progress = run_stage(
            model,
            stage,
            self._feed(index, parallel),
            optimizer=self.recipe.optimizer_of(stage),
            observer=self.observer,
            teacher=teacher,
            compile_mode=self.recipe.compile,
            parallel=parallel,
            weights=self.weights,
            saver=None if self.saved is None else self.saved.saver(index),
            held_out=self._held_out(parallel),
            stage_index=index,
            model_flops=self._model_flops(model, stage, teacher),
        )
        if not parallel.alone:
            # what FSDP makes refers to itself: shards and optimizer states would stay until Python happens to look
            gc.collect()
        return progress

    def _model_flops(self, model: Any, stage: Stage, teacher: Any) -> tuple[int, float] | None:
        """Return the operations of a step and the peak of a rank, where that is known."""
        peak = peak_flops(self.world.device, self.recipe.precision)
        if peak is None:
            return None
        # linear twins stand beside their teacher, and are given none
        teacher = getattr(model, "teacher", teacher)
        of_teacher = None if teacher is None else teacher.config
        return model_flops(stage, Networks(model.config, of_teacher, model.config)), peak

    def _parallel(self, index: int) -> Parallel:
        stage = self.recipe.stages[index]
        field = "mesh" if stage.mesh is None else f"stages.{stage.name}.mesh"
        return self.world.parallel(
            self.recipe.mesh_of(stage), self.recipe.precision, f"stages.{index} ({stage.name!r}): ", field
        )

    def _held_out(self, parallel: Parallel) -> HeldOut | None:
        """Return this rank's held-out windows, the same in every stage."""
        validation = self.recipe.validation
        if validation is None or self.held_out is None:
            return None
        fields = validation.model_dump(include={"data", "length"})
        windows = Stage(
            name="validation",
            loss="next_token",
            batch=validation.windows,
            steps=1,
            learning_rate=LearningRate(peak=1.0),
            **fields,
        )
        seed = self.recipe.seed * SEEDS_PER_RUN + SEEDS_PER_RUN - 2
        try:
            feed = self.held_out.feed(windows, seed, parallel.data_rank, parallel.mesh.data_parallel)
        except RecipeError as error:
            raise RecipeError(f"validation: {error}") from error
        return HeldOut(next(feed), validation.every)

    def _feed(self, index: int, parallel: Parallel) -> Feed:
        seed = self.recipe.seed * SEEDS_PER_RUN + index
        return self.data.feed(self.recipe.stages[index], seed, parallel.data_rank, parallel.mesh.data_parallel)


def sample(recipe: Recipe, data: Data) -> MicroBatch:
    """Return up to 8 windows like those of the first stage, for measurements before training."""
    seed = recipe.seed * SEEDS_PER_RUN + SEEDS_PER_RUN - 1
    return micro_batch_of(next(data.feed(recipe.stages[0], seed)).rows(0, 8), ALONE)
