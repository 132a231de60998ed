"""What a recipe will take on this machine, told from two short steps of each stage; and a recipe cut to a budget."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sala.convert.choose import Scorers
from sala.convert.select import RULES
from sala.errors import InputError
from sala.recipe import ConversionRecipe, Keep, Stage, load_recipe
from sala.runs.checks import networks_of
from sala.runs.identity import RECIPE
from sala.runs.run import make_model
from sala.runs.stages import StageRunner
from sala.train.batches import Data
from sala.train.budget import stage_memory
from sala.train.flops import stage_flops
from sala.train.loop import Progress
from sala.train.parallel import World, shadow

UNITS = {"h": 3600.0, "min": 60.0, "s": 1.0}
SIZES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
# the first step of a probe sets up memory and kernels, the second one is timed
PROBE_STEPS, PROBE_TOKENS = 2, 1024


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may take: seconds, or tokens of training."""

    seconds: float | None = None
    tokens: int | None = None


def parse_budget(text: str) -> Budget:
    """Read "2h", "90min" or a number of tokens such as "5M". Raises InputError."""
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?)(h|min|s)", text)) and float(found[1]):
        return Budget(seconds=float(found[1]) * UNITS[found[2]])
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text)) and float(found[1]):
        return Budget(tokens=round(float(found[1]) * SIZES[found[2]]))
    raise InputError(f"--budget {text!r}; expected a time such as 2h or 90min, or tokens such as 5M")


@dataclass(frozen=True, slots=True)
class StageForecast:
    """A stage's tokens, the seconds that it will take here, and the bytes that it asks of a GPU by formula."""

    name: str
    tokens: int
    seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Forecast:
    stages: tuple[StageForecast, ...]
    # of choosing the layers; 0 where that takes no scores
    selection_s: float

    @property
    def seconds(self) -> float:
        return self.selection_s + sum(stage.seconds for stage in self.stages)


def forecast(model: Any, recipe: ConversionRecipe, scorers: Scorers, data: Data, world: World) -> Forecast:
    """Time two short steps of each stage and return what the whole recipe will take; `model` becomes float32.

    A stage's operations are counted by formula (`stage_flops`); the probe says how many are done a second in a stage of
    its kind.
    """
    networks = networks_of(recipe, model.config, None)
    probe = _probe(recipe)
    moments: dict[str, list[float]] = {}

    def note(progress: Progress) -> None:
        moments.setdefault(progress.stage, []).append(perf_counter())

    blank = Scorers(lambda model: 0.0, lambda model: 0.0)
    make_model(model, StageRunner(probe, data, note, world), blank)
    stages = []
    for stage, short in zip(recipe.stages, probe.stages, strict=True):
        first, last = world.agree(moments[stage.name])
        of_a_step = stage_flops(short, networks).total / short.steps
        seconds = stage_flops(stage, networks).total / of_a_step * (last - first)
        memory = stage_memory(stage, networks, recipe.mesh_of(stage), recipe)
        stages.append(StageForecast(stage.name, stage.tokens, seconds, memory.total))
    return Forecast(tuple(stages), world.agree(_selection_s(model, recipe, scorers, world.device)))


def _probe(recipe: ConversionRecipe) -> ConversionRecipe:
    """Return a recipe of the same stages, two steps of a window or two each, that scores no layer."""
    stages = []
    for stage in recipe.stages:
        length = min(stage.length, max(PROBE_TOKENS, 2))
        batch = recipe.mesh_of(stage).data_parallel * max(1, min(stage.batch, PROBE_TOKENS // length))
        rate = stage.learning_rate.model_copy(update={"warmup_steps": 0})
        short = {"length": length, "batch": batch, "micro_batch": None, "steps": PROBE_STEPS, "learning_rate": rate}
        stages.append(stage.model_copy(update=short))
    keep = recipe.conversion.keep
    if keep.layers is None and keep.method != "none":
        keep = Keep(fraction=keep.fraction, count=keep.count, method="uniform", first_last=keep.first_last)
    conversion = recipe.conversion.model_copy(update={"keep": keep})
    return recipe.model_copy(update={"stages": tuple(stages), "conversion": conversion})


@torch.no_grad()
def _selection_s(model: Any, recipe: ConversionRecipe, scorers: Scorers, device: torch.device) -> float:
    """Return the seconds of scoring: candidate i computes layer i and those above it, and each layer once for the next."""
    keep = recipe.conversion.keep
    if keep.layers is not None or keep.method not in RULES:
        return 0.0
    here, length, layers = shadow(model, device), recipe.conversion.scoring.length, model.config.num_hidden_layers
    ids = torch.arange(length, device=device)[None] % model.config.vocab_size
    # the first pass sets up memory and kernels
    for _ in range(PROBE_STEPS):
        started = perf_counter()
        here(ids, use_cache=False, logits_to_keep=1).logits.sum().item()
    return scorers.tokens / length * (perf_counter() - started) * ((layers + 1) / 2 + 1)


def cut(recipe: ConversionRecipe, part: float) -> ConversionRecipe:
    """Return the recipe with every stage's steps times `part`, at least two."""
    stages = tuple(_cut(stage, part) for stage in recipe.stages)
    return recipe.model_copy(update={"stages": stages})


def _cut(stage: Stage, part: float) -> Stage:
    steps = max(2, math.floor(stage.steps * part))
    warmup = min(stage.learning_rate.warmup_steps, steps // 4)
    rate = stage.learning_rate.model_copy(update={"warmup_steps": warmup})
    return stage.model_copy(update={"steps": steps, "learning_rate": rate})


def fitting(recipe: ConversionRecipe, budget: Budget, foretold: Forecast) -> ConversionRecipe:
    """Return the recipe with as many steps as the budget pays for, at HALO's or the recipe's own ratio of stages.

    Raises:
        InputError: choosing the layers alone takes more.
    """
    if budget.tokens is not None:
        return cut(recipe, budget.tokens / sum(stage.tokens for stage in recipe.stages))
    assert budget.seconds is not None
    left = budget.seconds - foretold.selection_s
    if left <= 0:
        raise InputError(
            f"--budget: choosing the layers alone takes {foretold.selection_s / 60:.0f} min here; expected more, fewer questions "
            "(--set conversion.scoring.questions=32), or layers without scores (--set conversion.keep.method=uniform)"
        )
    return cut(recipe, left / (foretold.seconds - foretold.selection_s))


def within_budget(
    recipe: ConversionRecipe,
    budget: Budget,
    out: Path,
    *,
    model: Any,
    scorers: Scorers,
    data: Data,
    world: World,
    say: Callable[[str], None],
) -> ConversionRecipe:
    """Say what the recipe takes here and return it cut to the budget; a run that is there keeps the steps it began with."""
    if (out / RECIPE).is_file():
        begun = {stage.name: stage for stage in load_recipe(out / RECIPE).stages}
        cut_before = [
            stage.model_copy(update={name: getattr(begun[stage.name], name) for name in ("steps", "learning_rate")})
            for stage in recipe.stages
            if stage.name in begun
        ]
        return recipe.model_copy(update={"stages": tuple(cut_before)})
    say("timing two short steps of each stage")
    whole = forecast(model, recipe, scorers, data, world)
    fitted = fitting(recipe, budget, whole)
    for before, stage, here in zip(recipe.stages, fitted.stages, whole.stages, strict=True):
        seconds = here.seconds * stage.tokens / before.tokens
        say(f"{stage.name}: {stage.tokens:,} of the recipe's {before.tokens:,} tokens, about {_time(seconds)}")
    if whole.selection_s:
        say(f"choosing the layers: about {_time(whole.selection_s)}")
    return fitted


def _time(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.0f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )
