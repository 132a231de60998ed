"""Whole runs: a recipe from its beginning, or from where it was left, to the folder of the finished model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sala.convert.choose import Scorers
from sala.convert.selection import Selection
from sala.errors import writing
from sala.model import MiniCPMSALAForCausalLM
from sala.model.checkpoint import output_folder
from sala.model.finite import require_finite_logits, require_finite_weights
from sala.recipe import ConversionRecipe, Recipe, TrainingRecipe
from sala.runs.checks import model_config, networks_of, views
from sala.runs.conversion import Report, convert
from sala.runs.final import write_final
from sala.runs.folder import DEFAULTS, RunFolder, RunOptions
from sala.runs.identity import FINAL
from sala.runs.measured import NOTHING_KEPT, Measured
from sala.runs.record import read_metrics
from sala.runs.stages import StageRunner, ignore, sample
from sala.runs.start import Origin, start_of
from sala.train.batches import Corpus, Data, ShardData, read_data, read_held_out
from sala.train.initial import initialize
from sala.train.loop import Observer
from sala.train.parallel import CPU, ONE_PROCESS, World, shadow
from sala.train.weights import Weights

# tokens that a model which is given must answer with finite numbers
PROBE = 64


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


def run_recipe(
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
    recipe = recipe.on_ranks(world.ranks)
    given = "the teacher" if isinstance(recipe, ConversionRecipe) else "the model"
    if origin is not None:
        given = f"{given} {origin.name!r}"
    networks_of(recipe, None if model is None else model.config, tokenizer)
    data = read_data(recipe, tokenizer) if data is None else data
    held_out = read_held_out(recipe, data, tokenizer)
    StageRunner(recipe, data, observer, world, held_out=held_out).check()
    if model is not None:
        world.first(lambda: require_finite_weights(model, given))
    start = world.first(lambda: start_of(model, origin, tokenizer, data))
    network = model or _new_model_for_all(recipe, tokenizer, world)
    files = out if world.ranks > 1 else None
    with RunFolder(out, recipe, start, world, options) as folder, Weights(world, files) as weights:
        if world.main:
            _say_what_is_read(data, recipe, say)
        if model is not None:
            weights.unshare(model, copy=False)
            world.first(lambda: require_finite_logits(model, sample(recipe, data).input_ids[:1, :PROBE], given))
        runner = StageRunner(recipe, data, folder.recording(observer), world, folder, weights, held_out)

        def note(selection: Selection) -> None:
            with writing(out / "selection.json"):
                selection.write(out)

        trained, report = make_model(
            network, runner, scorers, folder.measured, say, lambda chosen: world.first(lambda: note(chosen))
        )

        def write() -> None:
            with output_folder(out / FINAL) as final:
                write_final(final, trained, report, tokenizer, recipe, data, read_metrics(out), origin)

        world.first(write)
    return trained


def _say_what_is_read(data: Data, recipe: Recipe, say: Callable[[str], None]) -> None:
    if isinstance(data, ShardData):
        for stage in recipe.stages:
            say(data.summary(stage))
    elif isinstance(data, Corpus):
        say(data.summary(recipe.stages))


def make_model(
    model: Any,
    runner: StageRunner,
    scorers: Scorers | None = None,
    measured: Measured = NOTHING_KEPT,
    say: Callable[[str], None] = lambda text: None,
    on_selection: Callable[[Selection], None] = lambda selection: None,
) -> tuple[Any, Report | None]:
    """Run the stages on a model or a teacher; return the model and, of a conversion, the report (see `convert`)."""
    runner.weights.unshare(model, copy=False)
    recipe = runner.recipe
    if isinstance(recipe, ConversionRecipe):
        assert scorers is not None
        there = Scorers(_on(runner.world.device, scorers.recall), _on(runner.world.device, scorers.language))
        return convert(model, runner, there, measured=measured, say=say, on_selection=on_selection)
    for view, stage in zip(views(recipe, model), recipe.stages, strict=True):
        runner(view, stage)
    return model, None


def _on(device: torch.device, score: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a score whose candidate, a whole model, has a copy on `device` meanwhile."""
    return lambda candidate: score(shadow(candidate, device))
