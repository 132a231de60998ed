"""Training steps of a hybrid through the loop of `sala train`: tokens a second, utilisation, memory, what a teacher costs."""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from sala.bench.cases import CASES
from sala.bench.ceilings import Ceilings, measure_ceilings
from sala.bench.device import free_cached, timer_of
from sala.bench.environment import environment
from sala.bench.failures import Failures
from sala.bench.inputs import Inputs
from sala.bench.length import length_label
from sala.bench.memory import peak_memory
from sala.bench.pair import our_config
from sala.bench.shapes import attention_shape, baseline_config, hybrid_config
from sala.engine.memory import available_bytes, human_bytes
from sala.errors import InputError, nearest
from sala.model import MiniCPMSALAForCausalLM
from sala.recipe import LearningRate, Mesh, Recipe, Stage
from sala.runs.stages import StageRunner
from sala.train import Progress, World, start_world
from sala.train.batches import StepFeed, WindowBatch
from sala.train.budget import stage_memory
from sala.train.cards import peak_flops
from sala.train.flops import Networks, model_flops
from sala.train.parallel import PRECISIONS

NEXT_TOKEN, DISTILL = "next_token", "distill"
LOSSES = (NEXT_TOKEN, DISTILL)
# of a new model, with which losses and gradients stay finite
INITIALIZER_RANGE = 0.02
# part of the memory that a plan may take: it does not count what an operator needs inside, nor fragments
USABLE = 0.8


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What to measure.

    tokens: of a step; at least one window. steps, warm_up: steps that are timed, and those before them, which compile.
    compile: as in a recipe. topk: numbers of chosen blocks, for the memory and time of block-sparse attention's forward and
    backward pass over `blocks_length` tokens; empty: not measured.
    """

    shape: str = "sala-1b"
    lengths: tuple[int, ...] = (4096, 32768, 131072)
    losses: tuple[str, ...] = LOSSES
    precision: str = "bfloat16"
    tokens: int = 32768
    steps: int = 5
    warm_up: int = 2
    compile: str = "auto"
    topk: tuple[int, ...] = (16, 32, 64, 128)
    blocks_length: int = 32768
    seed: int = 0


def run_train(
    plan: TrainPlan,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measure and return what `docs/benchmarks.md` describes; a stage that fails stands under `failures`.

    It runs where `sala train` would: on the GPU if there is one.

    say: told what starts. keep: given the results so far after every stage.

    Raises:
        InputError: no such shape or loss, or numbers below one.
    """
    _check(plan)
    with start_world(plan.precision) as world, warnings.catch_warnings():
        # torch's, of one process that shards with itself
        warnings.simplefilter("ignore", UserWarning)
        device = world.device
        say("ceilings of this machine")
        ceilings = measure_ceilings(timer_of(device), PRECISIONS[plan.precision])
        failures = Failures(say)
        points: list[dict[str, Any]] = []
        blocks: list[dict[str, Any]] = []
        results = {
            "kind": "train",
            "environment": environment(),
            "shape": plan.shape,
            "settings": asdict(plan) | {"device": device.type, "threads": torch.get_num_threads()},
            "ceilings": asdict(ceilings),
            "peak_flops_s": peak_flops(device, plan.precision),
            "points": points,
            "blocks": blocks,
            "failures": failures.rows,
        }
        for topk in plan.topk:
            say(f"infllm forward and backward, {length_label(plan.blocks_length)}, {topk} blocks chosen")
            with failures.noted("infllm training", f"{topk} blocks", plan.blocks_length):
                blocks.append(_blocks(plan, topk, device))
            free_cached(device)
            keep(results)
        student, teacher = _models(plan, device)
        results["parameters"] = {"student": _count(student), "teacher": 0 if teacher is None else _count(teacher)}
        for loss in plan.losses:
            for length in plan.lengths:
                say(f"{plan.shape}, {loss}, {length_label(length)}")
                with failures.noted(f"{plan.shape} {loss}", "training step", length):
                    of_teacher = teacher if loss == DISTILL else None
                    points.append(_measure(plan, loss, length, student, of_teacher, world, ceilings))
                free_cached(device)
                keep(results)
    return results


def overheads(points: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return by length how many times longer a step of distillation takes than one of next-token prediction."""
    seconds = {(point["loss"], point["length"]): point["step_s"] for point in points if point["status"] == "measured"}
    return {
        length: step_s / seconds[NEXT_TOKEN, length]
        for (loss, length), step_s in seconds.items()
        if loss == DISTILL and (NEXT_TOKEN, length) in seconds
    }


def _check(plan: TrainPlan) -> None:
    for what, names, known in (("loss", plan.losses, LOSSES), ("precision", (plan.precision,), tuple(PRECISIONS))):
        for name in names:
            if name not in known:
                raise InputError(f"no {what} {name!r}; there are {', '.join(known)}{nearest(name, known)}")
    if min(plan.tokens, plan.steps, plan.warm_up, plan.blocks_length, *plan.lengths, *plan.topk) < 1:
        raise InputError(f"a number below one in {asdict(plan)}; expected at least one of each")


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _models(plan: TrainPlan, device: torch.device) -> tuple[Any, Any]:
    """Return the hybrid and, where it is distilled, its full-attention baseline as a teacher: float32, random weights."""
    torch.manual_seed(plan.seed)
    configs = [hybrid_config(plan.shape)]
    if DISTILL in plan.losses:
        configs.append(our_config(baseline_config(plan.shape)))
    models = []
    for config in configs:
        config.initializer_range = INITIALIZER_RANGE
        with device:
            models.append(MiniCPMSALAForCausalLM(config).float())
    return models[0], models[1] if len(models) > 1 else None


@dataclass(frozen=True)
class RandomTokens:
    """Windows of random tokens, the same at every step; see `sala.train.Data`."""

    vocab_size: int

    def feed(self, stage: Stage, seed: int, rank: int = 0, ranks: int = 1) -> StepFeed:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocab_size, (stage.batch, stage.length), generator=generator)
        batch = WindowBatch(ids, torch.ones(ids.shape), ("random",) * stage.batch)
        return StepFeed(lambda step: batch, rank, ranks)

    def describe(self) -> dict[str, str]:
        return {"random": "tokens drawn uniformly"}


def _recipe(plan: TrainPlan, loss: str, length: int, *, checkpointing: bool) -> Recipe:
    stage = Stage(
        name=f"{loss}-{length}",
        loss=loss,  # type: ignore[arg-type]
        length=length,
        batch=max(1, plan.tokens // length),
        steps=plan.warm_up + plan.steps,
        learning_rate=LearningRate(peak=1e-5),
        activation_checkpointing=checkpointing,
        sparse=True,
        data={"random": 1.0},
    )
    return Recipe(
        name="bench",
        seed=plan.seed,
        precision=plan.precision,  # type: ignore[arg-type]
        compile=plan.compile,  # type: ignore[arg-type]
        stages=(stage,),
    )


def _measure(
    plan: TrainPlan, loss: str, length: int, student: Any, teacher: Any, world: World, ceilings: Ceilings
) -> dict[str, Any]:
    networks = Networks(student.config, None if teacher is None else teacher.config)
    for model in (student, teacher):
        if model is not None:
            model.cpu()  # where `sala train` has it; a stage before this one may have moved it
    free_cached(world.device)
    available = USABLE * available_bytes(world.device)
    for checkpointing in (False, True):
        recipe = _recipe(plan, loss, length, checkpointing=checkpointing)
        need = stage_memory(recipe.stages[0], networks, Mesh(), recipe)
        if need.total <= available:
            break
    stage = recipe.stages[0]
    point = {
        "loss": loss,
        "length": length,
        "windows": stage.batch,
        "activation_checkpointing": stage.activation_checkpointing,
        "predicted": asdict(need) | {"total": need.total},
    }
    if need.total > available:
        reason = f"predicted: {human_bytes(need.total)} are needed, {human_bytes(available)} may be taken"
        return point | {"status": "OOM", "reason": reason}
    moments = [perf_counter()]
    seen: list[Progress] = []

    def observe(progress: Progress) -> None:
        # the loop has waited for this step's gradients, so that from one to the next a whole step's work is done
        moments.append(perf_counter())
        seen.append(progress)

    runner = StageRunner(recipe, RandomTokens(student.config.vocab_size), observe, world)
    with peak_memory(world.device) as memory:
        runner(student, stage, teacher=teacher)
    each_s = [after - before for before, after in itertools.pairwise(moments)]
    step_s = median(each_s[plan.warm_up :])
    flops, peak = model_flops(stage, networks), peak_flops(world.device, plan.precision)
    floor_s = flops / ceilings.flops_s(PRECISIONS[plan.precision])
    return point | {
        "status": "measured",
        "step_s": step_s,
        "step_each_s": each_s,
        "tokens_s": stage.batch * stage.length / step_s,
        "model_flops": flops,
        "mfu": None if peak is None else flops / step_s / peak,
        "floor_s": floor_s,
        "times_floor": step_s / floor_s,
        "start_bytes": memory.start_bytes,
        "peak_bytes": memory.peak_bytes,
        "losses": [progress.loss for progress in seen],
    }


def _blocks(plan: TrainPlan, topk: int, device: torch.device) -> dict[str, Any]:
    """Return time and memory of block-sparse attention's forward and backward pass with so many blocks chosen."""
    shape = attention_shape(plan.shape)
    shape = dataclasses.replace(shape, geometry=dataclasses.replace(shape.geometry, topk=topk))
    (case,) = (case for case in CASES if case.name == "infllm training")
    timer = timer_of(device)
    run = case.work(Inputs(shape, PRECISIONS[plan.precision], device=device), plan.blocks_length).backend("auto")
    run()
    with peak_memory(device) as memory:
        run()
    each_s = [timer.seconds(run) for _ in range(plan.steps)]
    return {
        "length": plan.blocks_length,
        "topk": topk,
        "blocks_read": shape.geometry.num_selected,
        "median_s": median(each_s),
        "samples_s": each_s,
        "added_bytes": memory.added_bytes,
    }
