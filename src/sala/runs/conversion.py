"""HALO from a teacher to a hybrid: transfer, align, select, assemble, and the stages that follow."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sala.convert.choose import Scorers, blank_scores, record_of, score_layers, select_layers
from sala.convert.output_norm import measure_output_norms, scale_output_norms
from sala.convert.plan import config_of_hybrid, make_twins
from sala.convert.select import RULES
from sala.convert.selection import Selection
from sala.convert.step_zero import measure_step_zero
from sala.convert.transfer import assemble, kept_attention, require_teacher
from sala.model.mixers import reconfigured, sparse_mixers
from sala.recipe import ConversionRecipe, Stage
from sala.runs.measured import NOTHING_KEPT, Measured
from sala.runs.stages import StageRunner, sample


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage left; `layer_errors` (relative, one a layer) is empty but for alignment."""

    name: str
    loss: float
    layer_errors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did.

    step_zero: KL(teacher || changed teacher), nats a token, before any training of the hybrid, with one kind of change
    at a time ("gates", "positions", "linear_layers") and with all of them ("all").
    """

    kept: tuple[int, ...]
    mixer_types: tuple[str, ...]
    selection: Selection
    step_zero: dict[str, float]
    stages: tuple[StageResult, ...]


def convert(
    teacher: Any,
    runner: StageRunner,
    scorers: Scorers,
    *,
    measured: Measured = NOTHING_KEPT,
    say: Callable[[str], None] = lambda text: None,
    on_selection: Callable[[Selection], None] = lambda selection: None,
) -> tuple[Any, Report]:
    """Convert `teacher` (every layer "attention") by the runner's recipe; return the hybrid with what was done.

    A first stage with loss "align" trains the linear twins; the others train the hybrid in turn.

    Args:
        scorers: asked for every swapped layer when the layers are chosen by score. Items say how sure the choice is.
        measured: what was measured and decided before, when a run is started again: the twins' output norms, the scores
            of every candidate, the kept layers, the cost of step zero. All else is a function of teacher, recipe and
            seed, so with a runner that restores the parameters it trained, the same modules are reached.
        say: takes a line on what happens now.
        on_selection: takes which layers stay attention, before the hybrid is trained.

    Raises:
        ConfigError: the teacher has layers other than attention, or output gates.
        RecipeError: the recipe asks for layers that the teacher does not have.
    """
    recipe, unshare = runner.recipe, runner.weights.unshare
    assert isinstance(recipe, ConversionRecipe)
    settings, tokens = recipe.conversion, sample(recipe, runner.data)
    require_teacher(teacher.config)
    num_layers = teacher.config.num_hidden_layers
    # what cannot be is refused before an hour of alignment
    select_layers(settings, num_layers, blank_scores(num_layers))
    generator = torch.Generator().manual_seed(recipe.seed)
    twins = make_twins(teacher, settings, generator, unshare)
    if settings.output_norm_init == "measured":
        say("setting the size of every head's output")
        scale_output_norms(twins, measured.once("output_norms", lambda: measure_output_norms(twins, tokens)))
    results, remaining = [], list(recipe.stages)
    if remaining[0].loss == "align":
        results.append(_run(runner, twins, remaining.pop(0)))
    scores = outcomes = None
    if settings.keep.layers is None and settings.keep.method in RULES:
        scores, outcomes = score_layers(
            teacher, list(twins.twins), scorers, partial(measured.each, "layer_scores"), say
        )
    kept = tuple(measured.once("kept", lambda: list(select_layers(settings, num_layers, scores))))
    selection = record_of(settings.keep, num_layers, kept, scores, outcomes, recipe.seed)
    say(f"layers that stay attention: {', '.join(map(str, kept)) or 'none'}")
    if selection.warning:
        say(selection.warning)
    on_selection(selection)

    config = config_of_hybrid(teacher.config, settings, kept)
    kinds = list(config.mixer_types)
    mixers: dict[int, nn.Module] = dict(enumerate(twins.twins))
    for layer in kept:
        attention = teacher.model.layers[layer].self_attn
        mixers[layer] = unshare(kept_attention(attention, config, settings.gate_init, generator))
    step_zero = measured.once("step_zero", lambda: measure_step_zero(teacher, settings, kinds, mixers, tokens))
    hybrid = unshare(assemble(teacher, config, mixers))

    def switched(sparse: bool, scaling: bool) -> Any:
        return reconfigured(
            hybrid,
            mixer_types=sparse_mixers(kinds, sparse),
            attn_logits_scaling=settings.logits_scaling if scaling else None,
        )

    for stage in remaining:
        results.append(_run(runner, switched(stage.sparse, stage.logits_scaling), stage, teacher=teacher))
    finished = switched(sparse=True, scaling=True)
    return finished, Report(
        kept=kept,
        mixer_types=tuple(finished.config.mixer_types),
        selection=selection,
        step_zero=step_zero,
        stages=tuple(results),
    )


def _run(runner: StageRunner, model: Any, stage: Stage, *, teacher: Any = None) -> StageResult:
    last = runner(model, stage, teacher=teacher)
    return StageResult(stage.name, last.loss, tuple(last.layer_errors))
