"""A conversion end to end on tiny random teachers, with training passed in."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sala.convert import Scorers
from sala.convert.choose import num_kept
from sala.errors import ConfigError, RecipeError
from sala.model import with_mixers
from sala.recipe import Conversion, Keep, Stage, parse_recipe
from sala.runs.conversion import convert as convert_by
from sala.train.batches import StepFeed, WindowBatch
from sala.train.parallel import ONE_PROCESS
from sala.train.weights import PRIVATE

IDS = torch.arange(2 * 24).view(2, 24) % 50
SAMPLE = WindowBatch(IDS, torch.ones(2, 24), ("", ""))
SPARSE = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 8, "topk": 2, "dense_len": 8}
NUMBERS = {"length": 24, "batch": 1, "steps": 1, "learning_rate": {"peak": 1.0}, "data": {"text": 1}}
QUARTER = Keep(fraction=0.25)


def settings(keep: Keep = QUARTER, **changes: Any) -> Conversion:
    return Conversion(**{"keep": keep, "gate_init": "open", "sparse": SPARSE} | changes)


def stage(name: str, loss: str, **changes: Any) -> Stage:
    return Stage(name=name, loss=loss, **NUMBERS, **changes)


class Notes:
    """Remembers in JSON text, as a file would."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self.texts:
            self.texts[name] = json.dumps(compute())
        return json.loads(self.texts[name])

    def each(self, name: str, count: int, compute: Callable[[int], Any]) -> list[Any]:
        return [self.once(f"{name}-{index}", lambda index=index: compute(index)) for index in range(count)]


class Runner:
    """A runner whose training is passed in."""

    def __init__(self, recipe: Any, run_stage: Callable[..., Any], sample: WindowBatch):
        self.recipe, self.run_stage = recipe, run_stage
        self.data = SimpleNamespace(feed=lambda stage, seed: StepFeed(lambda step: sample))
        self.world, self.weights = ONE_PROCESS, PRIVATE

    def __call__(self, model: Any, stage: Stage, *, teacher: Any = None) -> Any:
        return self.run_stage(model, stage, teacher=teacher)


def trained(model: Any, stage: Stage, *, teacher: Any) -> Any:
    return SimpleNamespace(loss=1.0, layer_errors=())


def convert(
    teacher: Any,
    conversion: Conversion,
    stages: Any = (),
    *,
    run_stage: Callable[..., Any] = trained,
    recall: Callable[[Any], Any] = lambda model: 0.0,
    language: Callable[[Any], Any] = lambda model: 0.0,
    measured: Any = None,
    sample: WindowBatch = SAMPLE,
    seed: int = 0,
    **changes: Any,
) -> tuple[Any, Any]:
    rows = [row.model_dump() for row in stages or [stage("distill", "distill")]]
    recipe = parse_recipe({"name": "tiny", "seed": seed, "conversion": conversion.model_dump(), "stages": rows})
    runner: Any = Runner(recipe, run_stage, sample)
    return convert_by(teacher, runner, Scorers(recall, language), measured=measured or Notes(), **changes)


def test_scores_choose_the_layer_and_the_report_says_why(teacher_of: Callable, any_family: str) -> None:
    teacher = teacher_of(any_family)
    own = [layer.self_attn for layer in teacher.model.layers]

    def recall(model: Any) -> float:
        swapped = [i for i, layer in enumerate(model.model.layers) if layer.self_attn is not own[i]]
        assert len(swapped) == 1, "one layer at a time"
        return {0: 0.9, 1: 0.2, 2: 0.8, 3: 0.9}[swapped[0]]

    hybrid, report = convert(teacher, settings(), recall=recall)
    assert report.kept == (1,)
    sparse = "latent-minicpm4" if any_family == "minicpm3" else "minicpm4"
    assert report.mixer_types == ("lightning-attn", sparse, "lightning-attn", "lightning-attn")
    assert tuple(hybrid.config.mixer_types) == report.mixer_types
    assert report.selection.scores.recall == (0.9, 0.2, 0.8, 0.9)
    assert report.selection.importance[1] == max(report.selection.importance)
    assert [layer.self_attn for layer in teacher.model.layers] == own


def test_each_stage_trains_the_model_it_asks_for_and_all_the_same_parameters(teacher_of: Callable) -> None:
    teacher = teacher_of()
    seen = []

    def run_stage(model: Any, stage: Stage, *, teacher: Any) -> Any:
        seen.append((stage.name, type(model).__name__, teacher is not None, model))
        return SimpleNamespace(loss=1.0, layer_errors=())

    stages = [
        stage("align", "align"),
        stage("distill", "distill"),
        stage("long", "next_token", sparse=True, logits_scaling=True),
    ]
    wanted = settings(keep=Keep(count=2), logits_scaling=16)
    hybrid, report = convert(teacher, wanted, stages, run_stage=run_stage)
    assert [row[:3] for row in seen] == [
        ("align", "LinearTwins", False),
        ("distill", "MiniCPMSALAForCausalLM", True),
        ("long", "MiniCPMSALAForCausalLM", True),
    ]
    distilled, lengthened = seen[1][3], seen[2][3]
    assert "minicpm4" not in distilled.config.mixer_types
    assert distilled.config.attn_logits_scaling is None
    assert lengthened.config.mixer_types == hybrid.config.mixer_types
    assert lengthened.config.attn_logits_scaling == hybrid.config.attn_logits_scaling == 16
    pointers = {parameter.data_ptr() for parameter in hybrid.parameters()}
    assert {parameter.data_ptr() for parameter in distilled.parameters()} == pointers
    frozen = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not frozen & (pointers | {parameter.data_ptr() for parameter in seen[0][3].parameters()})
    assert len(report.stages) == 3


def test_open_gates_cost_nothing_and_positions_cost_something(teacher_of: Callable, any_family: str) -> None:
    teacher = teacher_of(any_family)
    _, report = convert(teacher, settings())
    assert report.step_zero["gates"] == pytest.approx(0, abs=1e-5)
    assert report.step_zero["positions"] > 1e-4
    assert report.step_zero["linear_layers"] > 1e-4

    _, report = convert(teacher, settings(gate_init="random", attention_rope=True))
    assert report.step_zero["gates"] > 1e-4
    assert report.step_zero["positions"] == pytest.approx(0, abs=1e-5)


def test_the_divergence_at_step_zero_is_that_of_the_hybrid(teacher_of: Callable) -> None:
    teacher = teacher_of()
    hybrid, report = convert(teacher, settings(logits_scaling=None))
    dense = [kind.replace("minicpm4", "attention") for kind in hybrid.config.mixer_types]
    with torch.no_grad():
        target = teacher(IDS, use_cache=False).logits.log_softmax(-1)
        own = with_mixers(hybrid, dense)(IDS, use_cache=False).logits.log_softmax(-1)
    expected = (target.exp() * (target - own)).sum(-1).mean().item()
    assert report.step_zero["all"] == pytest.approx(expected, rel=1e-4)


def test_what_is_measured_of_a_document_does_not_know_its_neighbours(teacher_of: Callable) -> None:
    wanted = settings(output_norm_init="measured")
    # the last five tokens are padding
    ids = torch.cat([IDS.flatten(), torch.arange(5)])[None]
    packed = WindowBatch(ids, torch.ones(1, 53), ("",), ((24, 48, 53),), torch.arange(53)[None] >= 48)
    apart, together = (convert(teacher_of(), wanted, sample=sample) for sample in (SAMPLE, packed))
    assert together[1].step_zero == pytest.approx(apart[1].step_zero, rel=1e-3)
    for ours, theirs in zip(together[0].parameters(), apart[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_teacher_with_gates_is_refused(teacher_of: Callable) -> None:
    with pytest.raises(ConfigError, match="the teacher has output gates"):
        convert(teacher_of(attn_use_output_gate=True), settings())


def test_rope_stays_when_the_ablation_asks(teacher_of: Callable) -> None:
    assert convert(teacher_of(), settings())[0].config.attn_use_rope is False
    assert convert(teacher_of(), settings(attention_rope=True))[0].config.attn_use_rope is True


def test_linear_layers_and_their_twins_go_without_rope_when_the_ablation_asks(teacher_of: Callable) -> None:
    seen: list[Any] = []

    def watch(model: Any, stage: Stage, *, teacher: Any) -> Any:
        seen.append(model)
        return SimpleNamespace(loss=1.0, layer_errors=())

    for wanted in (True, False):
        hybrid, _ = convert(teacher_of(), settings(lightning_rope=wanted), [stage("align", "align")], run_stage=watch)
        assert hybrid.config.lightning_use_rope is wanted
        assert all(twin.use_rope is wanted for twin in seen.pop().twins)
    with torch.no_grad():
        assert hybrid(IDS, use_cache=False).logits.isfinite().all()


def test_all_layers_can_be_linear(teacher_of: Callable) -> None:
    hybrid, report = convert(teacher_of(), settings(keep=Keep(method="none")))
    assert set(hybrid.config.mixer_types) == {"lightning-attn"}
    assert report.kept == ()


def test_the_same_seed_gives_the_same_hybrid(teacher_of: Callable) -> None:
    first, again, other = (convert(teacher_of(), settings(gate_init="random"), seed=seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


class Checkpoints:
    """Trains by moving every parameter, and hands back what it trained when it is asked again."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}

    def __call__(self, model: Any, stage: Stage, *, teacher: Any) -> Any:
        if stage.name not in self.states:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.01 * torch.randn_like(parameter)
            self.states[stage.name] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.states[stage.name])
        return SimpleNamespace(loss=1.0, layer_errors=())


STAGES = [stage("align", "align"), stage("distill", "distill")]
MEASURED = settings(gate_init="random", output_norm_init="measured")


def count_swaps(teacher: Any, seen: list[int]) -> Callable[[Any], float]:
    own = [layer.self_attn for layer in teacher.model.layers]

    def recall(model: Any) -> float:
        seen.extend(i for i, layer in enumerate(model.model.layers) if layer.self_attn is not own[i])
        return 0.1 * len(seen)

    return recall


def test_a_conversion_that_is_started_again_measures_nothing_twice(teacher_of: Callable, family: str) -> None:
    remember, run_stage, seen = Notes(), Checkpoints(), []
    teacher = teacher_of(family)
    known = {"measured": remember, "run_stage": run_stage}
    first, report = convert(teacher, MEASURED, STAGES, recall=count_swaps(teacher, seen), **known)
    assert seen == [0, 1, 2, 3]

    def never(model: Any) -> float:
        raise AssertionError("no candidate may be evaluated again")

    texts = dict(remember.texts)
    assert set(texts) == {"output_norms", *(f"layer_scores-{layer}" for layer in range(4)), "kept", "step_zero"}
    again, same = convert(teacher_of(family), MEASURED, STAGES, recall=never, language=never, **known)
    assert same == report
    assert remember.texts == texts
    assert first.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_candidates_scored_before_are_not_scored_again(teacher_of: Callable) -> None:
    remember, seen, teacher = Notes(), [], teacher_of()
    remember.texts |= {"layer_scores-0": "[0.9, 0.5]", "layer_scores-2": "[0.0, 0.5]"}
    _, report = convert(teacher, settings(), measured=remember, recall=count_swaps(teacher, seen))
    assert seen == [1, 3]
    assert report.selection.scores.recall == (0.9, 0.1, 0.0, 0.2)
    assert report.kept == (2,)


def test_items_say_how_sure_the_choice_is(teacher_of: Callable) -> None:
    teacher, said = teacher_of(), []
    own = [layer.self_attn for layer in teacher.model.layers]

    def layer_of(model: Any) -> int:
        [layer] = [i for i, layer in enumerate(model.model.layers) if layer.self_attn is not own[i]]
        return layer

    arguments = {
        "recall": lambda model: (1.0, 1.0, 1.0, 0.0) if layer_of(model) == 2 else (1.0,) * 4,
        "language": lambda model: [(0.1, 0.3, 0.2), (0.2, 0.1, 0.3)][layer_of(model) % 2],
        "measured": Notes(),
    }
    _, report = convert(teacher, settings(), say=said.append, **arguments)
    selection = report.selection
    assert selection.kept == report.kept == (2,)
    assert selection.scores.recall == (1, 1, 0.75, 1)
    # where the question that only it fails is not drawn, all four are equal
    assert selection.bootstrap.frequency[2] == pytest.approx(1 - 0.75**4 * 3 / 4, abs=0.04)
    assert selection.bootstrap.language_noise > selection.epsilon
    assert selection.warning in said
    assert convert(teacher, settings(), **arguments)[1] == report, "the resamples have a seed"


def test_a_mean_alone_says_nothing_of_how_sure_it_is(teacher_of: Callable) -> None:
    _, report = convert(teacher_of(), settings(), language=lambda model: (0.25, 0.75))
    assert report.selection.bootstrap is None
    assert report.selection.scores.language == (0.5,) * 4


@pytest.mark.parametrize(
    ("keep", "method", "kept"),
    [
        (Keep(method="uniform", count=2), "uniform", (1, 3)),
        (Keep(layers=(3, 1)), "layers", (1, 3)),
        (Keep(method="none"), "none", ()),
    ],
)
def test_a_choice_without_scores_is_recorded_too(teacher_of: Callable, keep: Keep, method: str, kept: tuple) -> None:
    _, report = convert(teacher_of(), settings(keep=keep))
    selection = report.selection
    assert (selection.method, selection.kept, selection.scores, selection.importance) == (method, kept, None, ())


def test_what_the_modules_start_from_is_no_matter_of_chance(teacher_of: Callable) -> None:
    """A conversion draws nothing from torch's own generator, whatever it remembers."""
    remember, teacher = Notes(), teacher_of()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    starts = []

    def run_stage(model: Any, stage: Stage, *, teacher: Any) -> Any:
        starts.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return SimpleNamespace(loss=1.0, layer_errors=())

    convert(teacher, MEASURED, STAGES, run_stage=run_stage, measured=remember)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    convert(teacher, MEASURED, STAGES, run_stage=run_stage, measured=remember)
    for first, again in zip(starts[:2], starts[2:], strict=True):
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_the_teacher_does_not_have_is_refused_before_training(teacher_of: Callable) -> None:
    def run_stage(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing may be trained")

    stages = [stage("align", "align")]
    with pytest.raises(RecipeError, match="names layer 7; the teacher has 0 to 3"):
        convert(teacher_of(), settings(keep=Keep(layers=(1, 7))), stages, run_stage=run_stage)
    with pytest.raises(RecipeError, match="keep is 9"):
        convert(teacher_of(), settings(keep=Keep(count=9)), stages, run_stage=run_stage)
    hybrid, _ = convert(teacher_of(), settings())
    with pytest.raises(ConfigError, match="starts from 'attention' in every layer"):
        convert(hybrid, settings(), stages, run_stage=run_stage)


def test_a_fraction_is_rounded_down_but_keeps_one() -> None:
    assert num_kept(Keep(fraction=0.25), 28) == 7
    assert num_kept(Keep(fraction=0.25), 37) == 9
    assert num_kept(Keep(fraction=0.25), 3) == 1
    assert num_kept(Keep(count=5), 28) == 5
