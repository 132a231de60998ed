"""HALO from a teacher to a hybrid: transfer, align, select, assemble, and the stages that follow."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sala.convert.align import Sample, Twins, inputs_of, real_tokens, swapped
from sala.convert.bootstrap import Outcomes, bootstrap
from sala.convert.output_norm import measure_output_norms, scale_output_norms
from sala.convert.select import RULES, LayerScores, importance, select
from sala.convert.selection import Selection
from sala.convert.transfer import (
    GateInit,
    assemble,
    hybrid_config,
    kept_attention,
    linear_twin,
    own,
    require_teacher,
)
from sala.errors import RecipeError
from sala.model import MiniCPMSALAConfig
from sala.model.mixers import reconfigured, sparse_mixers

LINEAR = "lightning-attn"

# model -> the outcome of every item, the same items for every model; or their mean alone, where they are not known
Score = Callable[[Any], float | Sequence[float]]
Say = Callable[[str], None]
Own = Callable[[Any], Any]


class Stage(Protocol):
    """What a conversion needs to know of a stage of training; the rest is between the recipe and `run_stage`."""

    @property
    def name(self) -> str: ...
    @property
    def loss(self) -> str: ...
    @property
    def sparse(self) -> bool: ...
    @property
    def logits_scaling(self) -> bool: ...


class RunStage(Protocol):
    """Train `model` in place through `stage`; the result has the last `loss`."""

    def __call__(self, model: Any, stage: Any, *, teacher: Any) -> Any: ...


class Remember(Protocol):
    """What a run has measured or decided already, so that a run that is started again does not do it again.

    Names are unique within a run and fit a file name; results are JSON values, floats included exactly.
    """

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result of `compute`: computed once in the life of a run, on any rank, the same on all ranks."""
        ...

    def each(self, name: str, count: int, compute: Callable[[int], Any]) -> list[Any]:
        """Return the results for 0 to count - 1: each computed once in the life of a run, shared out over the ranks."""
        ...


class Forgetful:
    """Remembers nothing: computes whenever it is asked."""

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        return compute()

    def each(self, name: str, count: int, compute: Callable[[int], Any]) -> list[Any]:
        return [compute(index) for index in range(count)]


FORGETFUL = Forgetful()


class Keep(Protocol):
    """Which layers stay attention: one of a fraction, a count, the layers themselves."""

    @property
    def fraction(self) -> float | None: ...
    @property
    def count(self) -> int | None: ...
    @property
    def layers(self) -> tuple[int, ...] | None: ...
    @property
    def method(self) -> str: ...
    @property
    def first_last(self) -> bool: ...
    @property
    def epsilon(self) -> float: ...


class Settings(Protocol):
    """What becomes of a teacher; a recipe's `conversion` is one."""

    @property
    def keep(self) -> Keep: ...
    @property
    def attention_rope(self) -> bool: ...
    @property
    def lightning_rope(self) -> bool: ...
    @property
    def gate_init(self) -> GateInit: ...
    @property
    def output_norm_init(self) -> Literal["ones", "measured"]: ...
    @property
    def logits_scaling(self) -> float | None: ...
    @property
    def sparse(self) -> Any: ...


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


def num_kept(keep: Keep, num_layers: int) -> int:
    """Return how many layers stay attention: HALO's floor of the fraction, at least one."""
    if keep.count is not None:
        return keep.count
    return max(1, int(num_layers * (keep.fraction or 0)))


@torch.no_grad()
def score_layers(
    teacher: Any, twins: Sequence[nn.Module], recall: Score, language: Score, remember: Remember, say: Say
) -> tuple[LayerScores, Outcomes | None]:
    """Score the models M_i, the teacher with only layer i linear; return means and, where they are known, items."""

    def score(layer: int) -> list[Any]:
        say(f"scoring layer {layer + 1} of {len(twins)}")
        with swapped(teacher, {layer: twins[layer]}):
            return [_plain(recall(teacher)), _plain(language(teacher))]

    recall_rows, language_rows = zip(*remember.each("layer_scores", len(twins), score), strict=True)
    if any(isinstance(row, float) for row in (*recall_rows, *language_rows)):
        return LayerScores(recall=_means(recall_rows), language=_means(language_rows)), None
    outcomes = Outcomes.of(recall_rows, language_rows)
    return outcomes.scores, outcomes


def _plain(score: float | Sequence[float]) -> float | list[float]:
    """Return a score as JSON takes it."""
    return [float(item) for item in score] if isinstance(score, Sequence) else float(score)


def _means(rows: Iterable[Any]) -> tuple[float, ...]:
    return tuple(row if isinstance(row, float) else sum(row) / len(row) for row in rows)


@torch.no_grad()
def _log_probs(model: Any, sample: Sample) -> Tensor:
    """Return (N, X), what a model says after every token of a sample that is no padding."""
    logits_BTX = model(**inputs_of(sample, model), use_cache=False).logits
    return real_tokens(logits_BTX, sample).float().log_softmax(dim=-1)


def divergence(teacher_NX: Tensor, model: Any, sample: Sample) -> float:
    """Return the mean KL(teacher || model) in nats a token; `teacher_NX` holds the teacher's log-probabilities."""
    own_NX = _log_probs(model, sample)
    return (teacher_NX.exp() * (teacher_NX - own_NX)).sum(dim=-1).mean().item()


def select_layers(settings: Settings, num_layers: int, scores: LayerScores | None) -> tuple[int, ...]:
    """Return the layers that stay attention, ascending. Raises RecipeError for what the model does not have."""
    keep = settings.keep
    if keep.layers is not None:
        if wrong := [layer for layer in keep.layers if layer >= num_layers]:
            raise RecipeError(f"conversion.keep.layers names layer {wrong[0]}; the teacher has 0 to {num_layers - 1}")
        return tuple(sorted(set(keep.layers)))
    amount = 0 if keep.method == "none" else num_kept(keep, num_layers)
    return select(
        num_layers, amount, method=keep.method, scores=scores, epsilon=keep.epsilon, first_last=keep.first_last
    )


def halo(
    teacher: Any,
    settings: Settings,
    stages: Sequence[Stage],
    *,
    run_stage: RunStage,
    score_recall: Score,
    score_language: Score,
    sample: Sample,
    seed: int = 0,
    own: Own = own,
    remember: Remember = FORGETFUL,
    say: Say = lambda text: None,
    on_selection: Callable[[Selection], None] = lambda selection: None,
) -> tuple[Any, Report]:
    """Convert `teacher` (every layer "attention") and return the hybrid with what was done.

    Args:
        stages: a first one with loss "align" trains the linear twins; the others train the hybrid in turn.
        run_stage: the training loop.
        score_recall, score_language: model -> the outcome of every item, higher is better, or their mean alone; asked
            for every swapped layer when the layers are chosen by score. Items say how sure the choice is.
        sample: tokens for the measurements before training.
        own: gives a module parameters of its own, as `transfer.own` does in this process's memory; returns it.
        remember: what was measured and decided before, when a run is started again: the twins' output norms, the scores
            of every candidate, the kept layers, the cost of step zero. All else is a function of teacher, settings and
            seed, so with `run_stage` restoring the parameters it trained, the same modules are reached.
        say: takes a line on what happens now.
        on_selection: takes which layers stay attention, before the hybrid is trained.

    Raises:
        ConfigError: the teacher has layers other than attention, or output gates.
        RecipeError: the settings ask for layers that the teacher does not have.
    """
    require_teacher(teacher.config)
    num_layers = teacher.config.num_hidden_layers
    # what cannot be is refused before an hour of alignment
    select_layers(settings, num_layers, _blank(num_layers))
    generator = torch.Generator().manual_seed(seed)
    twins = _make_twins(teacher, settings, generator, own)
    if settings.output_norm_init == "measured":
        say("setting the size of every head's output")
        scale_output_norms(twins, remember.once("output_norms", lambda: measure_output_norms(twins, sample)))
    results, remaining = [], list(stages)
    if remaining and remaining[0].loss == "align":
        results.append(_run(run_stage, twins, remaining.pop(0), teacher=None))
    scores = outcomes = None
    if settings.keep.layers is None and settings.keep.method in RULES:
        scores, outcomes = score_layers(teacher, list(twins.twins), score_recall, score_language, remember, say)
    kept = tuple(remember.once("kept", lambda: list(select_layers(settings, num_layers, scores))))
    selection = _selection(settings.keep, num_layers, kept, scores, outcomes, seed)
    say(f"layers that stay attention: {', '.join(map(str, kept)) or 'none'}")
    if selection.warning:
        say(selection.warning)
    on_selection(selection)

    config = _config_of_hybrid(teacher.config, settings, kept)
    kinds = list(config.mixer_types)
    mixers: dict[int, nn.Module] = dict(enumerate(twins.twins))
    for layer in kept:
        attention = teacher.model.layers[layer].self_attn
        mixers[layer] = own(kept_attention(attention, config, settings.gate_init, generator))
    step_zero = remember.once("step_zero", lambda: _step_zero(teacher, settings, kinds, mixers, sample))
    hybrid = own(assemble(teacher, config, mixers))

    def switched(sparse: bool, scaling: bool) -> Any:
        return reconfigured(
            hybrid,
            mixer_types=sparse_mixers(kinds, sparse),
            attn_logits_scaling=settings.logits_scaling if scaling else None,
        )

    for stage in remaining:
        results.append(_run(run_stage, switched(stage.sparse, stage.logits_scaling), stage, teacher=teacher))
    finished = switched(sparse=True, scaling=True)
    return finished, Report(
        kept=kept,
        mixer_types=tuple(finished.config.mixer_types),
        selection=selection,
        step_zero=step_zero,
        stages=tuple(results),
    )


def _config_of_hybrid(teacher: MiniCPMSALAConfig, settings: Settings, kept: Sequence[int]) -> MiniCPMSALAConfig:
    kinds = [kind if layer in kept else LINEAR for layer, kind in enumerate(teacher.mixer_types)]
    return hybrid_config(
        teacher,
        kinds,
        rope=settings.attention_rope,
        gates=True,
        lightning_use_rope=settings.lightning_rope,
        sparse_config=settings.sparse.model_dump(),
    )


def _config_of_twins(teacher: MiniCPMSALAConfig, settings: Settings) -> MiniCPMSALAConfig:
    kinds = [LINEAR] * teacher.num_hidden_layers
    return hybrid_config(teacher, kinds, rope=True, gates=False, lightning_use_rope=settings.lightning_rope)


def planned_configs(teacher: MiniCPMSALAConfig, settings: Settings) -> tuple[MiniCPMSALAConfig, MiniCPMSALAConfig]:
    """Return the configurations of the hybrid that `halo` will make, and of a model of the linear twins.

    Which layers stay attention is a guess where it is up to scores: as many, spread evenly.

    Raises:
        ConfigError, RecipeError: as `halo`.
    """
    require_teacher(teacher)
    layers, keep = teacher.num_hidden_layers, settings.keep
    kept = select_layers(settings, layers, _blank(layers))
    if keep.layers is None and keep.method in RULES:
        kept = select(layers, len(kept), method="uniform", first_last=keep.first_last)
    return _config_of_hybrid(teacher, settings, kept), _config_of_twins(teacher, settings)


def _make_twins(teacher: Any, settings: Settings, generator: torch.Generator, own: Own) -> Twins:
    config = _config_of_twins(teacher.config, settings)
    # each owned before the next one is made: with several ranks there is no more than one in this one's memory
    twins = [own(linear_twin(layer.self_attn, config, settings.gate_init, generator)) for layer in teacher.model.layers]
    return Twins(teacher, twins, config)


def _blank(num_layers: int) -> LayerScores:
    return LayerScores(recall=(0.0,) * num_layers, language=(0.0,) * num_layers)


def _selection(
    keep: Keep,
    num_layers: int,
    kept: tuple[int, ...],
    scores: LayerScores | None,
    outcomes: Outcomes | None,
    seed: int,
) -> Selection:
    method = keep.method if keep.layers is None else "layers"
    sure = None
    if outcomes is not None:
        sure = bootstrap(
            outcomes, len(kept), method=method, epsilon=keep.epsilon, first_last=keep.first_last, seed=seed
        )
    return Selection(
        num_layers=num_layers,
        method=method,
        epsilon=keep.epsilon,
        first_last=keep.first_last,
        kept=kept,
        scores=scores,
        importance=() if scores is None else importance(scores, keep.epsilon, method),
        bootstrap=sure,
    )


def _run(run_stage: RunStage, model: Any, stage: Stage, *, teacher: Any) -> StageResult:
    last = run_stage(model, stage, teacher=teacher)
    return StageResult(stage.name, last.loss, tuple(last.layer_errors))


def _step_zero(
    teacher: Any, settings: Settings, kinds: Sequence[str], mixers: dict[int, nn.Module], sample: Sample
) -> dict[str, float]:
    """Return what each kind of change alone costs the teacher, and all of them together."""
    kept = [layer for layer, kind in enumerate(kinds) if kind != LINEAR]
    linear = {layer: mixer for layer, mixer in mixers.items() if layer not in kept}

    def attention(rope: bool, gates: bool) -> dict[int, nn.Module]:
        config = hybrid_config(teacher.config, kinds, rope=rope, gates=gates)
        changed = {}
        for layer in kept:
            mixer = kept_attention(teacher.model.layers[layer].self_attn, config, "open", torch.Generator())
            if gates:
                mixer.load_state_dict(mixers[layer].state_dict(), assign=True)
            changed[layer] = mixer
        return changed

    teacher_NX = _log_probs(teacher, sample)
    changes = {
        "gates": attention(rope=True, gates=True),
        "positions": attention(rope=settings.attention_rope, gates=False),
        "linear_layers": linear,
        "all": mixers,
    }
    losses = {}
    for name, change in changes.items():
        with swapped(teacher, change):
            losses[name] = divergence(teacher_NX, teacher, sample)
    return losses
