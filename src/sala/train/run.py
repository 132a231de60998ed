"""Whole runs: a model from scratch, or a conversion around the function that is passed in."""

import dataclasses
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from sala.data import tokenizer_hash
from sala.errors import writing
from sala.model import MiniCPMSALAForCausalLM
from sala.model.checkpoint import output_folder
from sala.model.finite import require_finite_logits, require_finite_weights
from sala.recipe import ConversionRecipe, Recipe, Stage, TrainingRecipe
from sala.train.batches import Corpus, Data, Feed, ShardData, read_data
from sala.train.budget import Networks, model_flops, peak_flops
from sala.train.card import model_card, versions
from sala.train.checks import (
    model_config,
    require_feeds,
    require_freezable,
    require_same_shape,
    require_trainable,
    require_vocabulary,
    views,
)
from sala.train.folder import DEFAULTS, FINAL, Measured, RunFolder, RunOptions
from sala.train.initial import initialize
from sala.train.loop import Keeper, Observer, Part, Progress, part_of, run_stage
from sala.train.parallel import ALONE, CPU, ONE_PROCESS, Parallel, World, shadow
from sala.train.record import read_metrics
from sala.train.start import Origin, start_of
from sala.train.weights import PRIVATE, Weights

# stages of one run draw different data: each has a seed of its own
SEEDS_PER_RUN = 1000
# tokens that a model which is given must answer with finite numbers
PROBE = 64


def ignore(progress: Progress) -> None:
    """The observer that shows nothing."""


class Kept(Protocol):
    """The stages of a run that are done, by their last steps, and who puts back the one after them."""

    @property
    def finished(self) -> list[Progress]: ...

    def keeper(self, index: int) -> Keeper: ...


@dataclass(frozen=True)
class StageRunner:
    """Runs the stages of one recipe: data, seed, optimizer, mesh and keeper of each."""

    recipe: Recipe
    data: Data
    observer: Observer
    world: World = ONE_PROCESS
    kept: Kept | None = None
    weights: Weights = PRIVATE

    def check(self) -> None:
        """Raise RecipeError for what a stage cannot have, before anything is trained."""
        meshes = [self._parallel(index).mesh for index in range(len(self.recipe.stages))]
        require_feeds(self.recipe, self.data, [mesh.data_parallel for mesh in meshes])

    def __call__(self, model: Any, stage: Stage, *, teacher: Any = None) -> Progress:
        index = self.recipe.stages.index(stage)
        if self.kept is not None and index < len(self.kept.finished):
            # a later stage's checkpoint has every parameter that this one left behind
            return self.kept.finished[index]
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
            keeper=None if self.kept is None else self.kept.keeper(index),
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

    def _feed(self, index: int, parallel: Parallel) -> Feed:
        seed = self.recipe.seed * SEEDS_PER_RUN + index
        return self.data.feed(self.recipe.stages[index], seed, parallel.data_rank, parallel.mesh.data_parallel)


def sample(recipe: Recipe, data: Data) -> Part:
    """Return up to 8 windows like those of the first stage, for measurements before training."""
    seed = recipe.seed * SEEDS_PER_RUN + SEEDS_PER_RUN - 1
    return part_of(next(data.feed(recipe.stages[0], seed)).rows(0, 8), ALONE)


def _write_model(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    own, computed = model.config.dtype or torch.float32, torch.float32
    dtype = own if recipe.stored_as is None else getattr(torch, recipe.stored_as)
    stored = model if dtype == computed else shadow(model).to(dtype)
    stored.save_pretrained(folder)
    if recipe.stored_as is not None:
        # its dtype is the one to compute in, whatever the file holds
        stored.config.dtype = computed
        stored.config.save_pretrained(folder)
    model.config.dtype = computed
    tokenizer.save_pretrained(folder)
    recipe.save(folder / "recipe.yaml")


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> MiniCPMSALAForCausalLM:
    """Return a model of `model_config` with random weights of the recipe's seed."""
    assert isinstance(recipe, TrainingRecipe)
    config = model_config(recipe, tokenizer)
    torch.manual_seed(recipe.seed)
    model = MiniCPMSALAForCausalLM(config)
    initialize(model, recipe.init)
    return model


def _new_model_for_all(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, world: World) -> MiniCPMSALAForCausalLM:
    """Return a new model whose weights rank 0 alone has drawn, for `Weights.own` to give to all."""
    with torch.device("cpu" if world.main else "meta"):
        model = new_model(recipe, tokenizer)
    if not world.main:
        # memory that nothing is written to takes no room
        model.to_empty(device=CPU)
        model.tie_weights()
    return model


def _on(device: torch.device, score: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a score whose candidate, a whole model, has a copy on `device` meanwhile."""
    return lambda candidate: score(shadow(candidate, device))


@dataclass(frozen=True)
class Scorers:
    """What a conversion is given by higher units: `sala.convert.halo`, and model -> score of a candidate for selection."""

    halo: Callable[..., tuple[Any, Any]]
    recall: Callable[[Any], Any]
    language: Callable[[Any], Any]


def train(
    recipe: Recipe,
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    model: Any = None,
    scorers: Scorers | None = None,
    data: Data | None = None,
    observer: Observer = ignore,
    say: Callable[[str], None] = lambda text: None,
    world: World = ONE_PROCESS,
    options: RunOptions = DEFAULTS,
    origin: Origin | None = None,
) -> Any:
    """Run a recipe in the folder `out` and return the model; an interrupted run in `out` goes on where it was saved.

    The folder: `recipe.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`; of a conversion `measured/` and, once its
    layers are chosen, `selection.json` and its plot; and when everything is done `final/`, the Hugging Face folder.

    Args:
        model: the teacher of a conversion; for another recipe what is trained instead of a new model. It becomes float32,
            on the CPU; with several ranks its parameters are mapped (`Weights`), and so are those of what is returned.
        scorers: needed for a conversion.
        origin: of `model`, for the card.

    Raises:
        Finished: the same run is there, and finished: nothing is left to do, and nothing is changed.
        InputError: `out` is no folder of this run, or the tokenizer is not the model's.
        CheckpointError: the model's weights or logits are not finite.
        DiskError: something cannot be written; it says from where the run goes on.
        RecipeError: a stage cannot run, or the recipe is not that of the interrupted run.
        Interrupted: SIGTERM or Ctrl-C came; everything is saved.
    """
    data = read_data(recipe, tokenizer) if data is None else data
    StageRunner(recipe, data, observer, world).check()
    if isinstance(recipe, ConversionRecipe):
        require_same_shape(recipe, model.config)
        require_freezable(recipe, model)
    network = model or _new_model_for_all(recipe, tokenizer, world)
    require_vocabulary(network.config, tokenizer)
    if isinstance(recipe, TrainingRecipe):
        require_trainable(recipe, network.config)
    given = "the teacher" if isinstance(recipe, ConversionRecipe) else "the model"
    if origin is not None:
        given = f"{given} {origin.name!r}"
    if model is not None:
        world.on_main(lambda: require_finite_weights(model, given))
    start = world.on_main(lambda: start_of(model, origin, tokenizer, data))
    files = out if world.ranks > 1 else None
    with RunFolder(out, recipe, start, world, options) as folder, Weights(world, files) as weights:
        if world.main:
            _say_what_is_read(data, recipe, say)
        if model is not None:
            weights.own(model, copy=False)
            world.on_main(lambda: require_finite_logits(model, sample(recipe, data).input_ids[:1, :PROBE], given))
        runner = StageRunner(recipe, data, folder.recording(observer), world, folder, weights)

        def note(selection: Any) -> None:
            with writing(out / "selection.json"):
                selection.write(out)

        trained, report = make_model(
            recipe, network, scorers, runner, folder.measured, say, lambda chosen: world.on_main(lambda: note(chosen))
        )

        def write() -> None:
            with output_folder(out / FINAL) as final:
                write_final(final, trained, report, tokenizer, recipe, data, read_metrics(out), origin)

        world.on_main(write)
    return trained


def _say_what_is_read(data: Data, recipe: Recipe, say: Callable[[str], None]) -> None:
    if isinstance(data, ShardData):
        for stage in recipe.stages:
            say(data.summary(stage))
    elif isinstance(data, Corpus):
        say(data.summary(recipe.stages))


NOTHING_KEPT = Measured(None, ONE_PROCESS)


def make_model(
    recipe: Recipe,
    model: Any,
    scorers: Scorers | None,
    runner: StageRunner,
    remember: Any = NOTHING_KEPT,
    say: Callable[[str], None] = lambda text: None,
    on_selection: Callable[[Any], None] = lambda selection: None,
) -> tuple[Any, Any]:
    """Run the stages on a model or a teacher; return the model and, of a conversion, the report.

    remember: what a run has measured and decided (`Measured`); the default keeps nothing. on_selection: see `halo`.
    """
    runner.weights.own(model, copy=False)
    if isinstance(recipe, ConversionRecipe):
        assert scorers is not None
        return _convert(recipe, model, scorers, runner, remember, say, on_selection)
    return _train(recipe, model, runner), None


def _train(recipe: Recipe, model: Any, runner: StageRunner) -> Any:
    for view, stage in zip(views(recipe, model), recipe.stages, strict=True):
        runner(view, stage)
    return model


def _convert(
    recipe: ConversionRecipe,
    teacher: Any,
    scorers: Scorers,
    runner: StageRunner,
    remember: Any,
    say: Callable[[str], None],
    on_selection: Callable[[Any], None],
) -> tuple[Any, Any]:
    return scorers.halo(
        teacher,
        recipe.conversion,
        recipe.stages,
        run_stage=runner,
        own=runner.weights.own,
        score_recall=_on(runner.world.device, scorers.recall),
        score_language=_on(runner.world.device, scorers.language),
        sample=sample(recipe, runner.data),
        seed=recipe.seed,
        say=say,
        remember=remember,
        on_selection=on_selection,
    )


def write_final(
    folder: Path,
    model: Any,
    report: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    data: Data,
    steps: Sequence[Mapping[str, Any]],
    origin: Origin | None,
) -> None:
    """Write a model with its card, tokenizer and recipe, and of a conversion the report."""
    _write_model(folder, model, tokenizer, recipe)
    card = model_card(
        name=recipe.name,
        recipe=recipe.resolved,
        config=model.config.to_dict(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        metrics=steps,
        data=data.describe(),
        tokenizer_sha256=tokenizer_hash(tokenizer),
        versions=versions(),
        teacher=None if origin is None else origin.name,
        base_model=origin.name if origin is not None and origin.on_hub else None,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    if report is not None:
        report.selection.write(folder)
        text = json.dumps(dataclasses.asdict(report), indent=1)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
