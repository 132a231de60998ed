"""A stage of training: its windows, loss, learning rate, optimizer and mesh."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from sala.errors import RecipeError
from sala.recipe.schedule import learning_rate
from sala.recipe.section import Positive, Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class LearningRate(Section):
    """A stage's curve; `final` is `peak` when left out."""

    peak: Annotated[float, Field(gt=0)]
    final: Annotated[float, Field(gt=0)] | None = None
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    curve: Literal["constant", "cosine", "exponential", "wsd"] = "constant"

    @model_validator(mode="after")
    def _agrees(self) -> "LearningRate":
        if self.curve == "constant" and self.final not in (None, self.peak):
            raise ValueError(
                f"final is {self.final} but curve 'constant' stays at peak {self.peak}; name another curve"
            )
        if self.curve != "constant" and self.final is None:
            raise ValueError(f"curve {self.curve!r} needs 'final', the learning rate of the last step")
        return self

    def at(self, step: int, steps: int) -> float:
        """Return the learning rate of `step` (from 0) in a stage of `steps`."""
        return learning_rate(
            step, steps, peak=self.peak, final=self.final or self.peak, warmup_steps=self.warmup_steps, curve=self.curve
        )


class Optimizer(Section):
    """`muon` orthogonalises the updates of the layers' matrices, the rest is AdamW's; `adamw` takes everything."""

    kind: Literal["adamw", "muon"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Decay = 0.95
    # AdamW's learning rate as a part of Muon's; without meaning for kind "adamw"
    adamw_ratio: Annotated[float, Field(gt=0)] = 1.0
    # the learning rate of query and key biases as a part of the stage's; as AdamW's others when left out
    bias_ratio: Annotated[float, Field(gt=0)] | None = None
    clip: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _agrees(self) -> "Optimizer":
        if self.kind == "adamw" and (given := self.changed("momentum", "adamw_ratio")):
            raise ValueError(f"{given} has no effect with kind 'adamw'; remove it or use kind 'muon'")
        return self


class Mesh(Section):
    """Ranks of a run: copies of the model, shards of each copy, and ranks that share a window's tokens.

    Parameters are sharded over `dp_shard` x `cp`; a batch's windows are split over `dp_replicate` x `dp_shard`.
    """

    dp_replicate: Positive = 1
    dp_shard: Positive = 1
    cp: Positive = 1

    @property
    def data_parallel(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def ranks(self) -> int:
        return self.data_parallel * self.cp


def _whole(spelling: str, tokens: Any, field: str, sizes: list[Any]) -> int:
    """Return how many units of the product of `sizes` tokens are, or raise ValueError with the nearest numbers that fit."""
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"{spelling} must be a whole number above 0, got {tokens!r}")
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return 1  # their own errors say what is wrong
    unit = math.prod(sizes)
    if tokens % unit:
        fits = (f"{n * unit:,} ({field} {n:,})" for n in (tokens // unit, tokens // unit + 1) if n)
        raise ValueError(
            f"{spelling} {tokens:,} is not a multiple of {' x '.join(f'{size:,}' for size in sizes)} tokens; "
            f"expected {' or '.join(fits)}"
        )
    return tokens // unit


def divisors(number: int) -> str:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return ", ".join(map(str, sorted({*small, *(number // n for n in small)})))


class Stage(Section):
    """One row of a run: `steps` steps of `batch` windows of `length` tokens.

    A row may be written in tokens, as papers do: `batch_tokens` for `batch`, `tokens` for `steps`.
    """

    spellings = ("batch_tokens", "tokens")

    name: str
    loss: Literal["align", "distill", "next_token"]
    trainable: Literal["linear_attention", "mixers", "all"] = "all"
    # leave queries and keys (projections and norms) of every layer as they are: instruction tuning spoils long recall
    # through them
    freeze_qk: bool = False
    length: Annotated[int, Field(gt=1)]
    batch: Positive
    # windows of one forward and backward pass of a rank; gradients add up over the batch. All at once when left out
    micro_batch: Positive | None = None
    steps: Positive
    learning_rate: LearningRate
    optimizer: Optimizer | None = None
    mesh: Mesh | None = None
    # keep only what enters a layer and compute the rest again in the backward pass
    activation_checkpointing: bool = False
    # train the kept layers with block-sparse attention, and with the conversion's logit scale
    sparse: bool = False
    logits_scaling: bool = False
    # distillation counts a token by the data's weight for it, none below a tenth; HALO counts all alike
    weighted: bool = False
    # HALO aligns with one loss over all layers; clipping each layer by itself keeps a layer with a large gradient
    # from slowing the others
    clip_per_layer: bool = False
    # the share of each task: a number, or a list of those at equally spaced moments of the stage, straight in between
    data: Annotated[dict[str, float | tuple[float, ...]], Field(min_length=1)]

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.length

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weight of each task at `step` (from 0)."""
        progress = step / max(1, self.steps - 1)
        return {
            name: float(np.interp(progress, np.linspace(0, 1, len(weight)), weight))
            if isinstance(weight, tuple)
            else weight
            for name, weight in self.data.items()
        }

    @classmethod
    def _respelled(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        row = dict(values)
        for field, spelling, sizes in (("batch", "batch_tokens", ["length"]), ("steps", "tokens", ["batch", "length"])):
            tokens = row.pop(spelling, None)
            if (tokens is None) == (row.get(field) is None):
                given = "none" if tokens is None else f"{field}, {spelling}"
                raise ValueError(f"give one of {field}, {spelling}; given: {given}")
            if tokens is not None:
                row[field] = _whole(spelling, tokens, field, [row.get(size) for size in sizes])
        return row

    @field_validator("data", mode="before")
    @classmethod
    def _weights(cls, data: Any) -> Any:
        for name, weight in data.items() if isinstance(data, Mapping) else ():
            points = weight if isinstance(weight, list | tuple) else (weight, weight)
            numbers = [p for p in points if isinstance(p, int | float) and not isinstance(p, bool) and p >= 0]
            if len(points) < 2 or len(numbers) < len(points):
                raise ValueError(
                    f"{name}: a weight is a number, or a list of two or more, none below 0; got {weight!r}"
                )
            if not any(numbers):
                raise ValueError(f"{name} has weight 0 throughout; leave it out")
        return data

    @model_validator(mode="after")
    def _agrees(self) -> "Stage":
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(
                f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}; "
                f"expected one of {divisors(self.batch)}"
            )
        if self.learning_rate.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.learning_rate.warmup_steps} leaves nothing of {self.steps} steps")
        moments = {i / (len(w) - 1) for w in self.data.values() if isinstance(w, tuple) for i in range(len(w))}
        for moment in moments:
            if not sum(self.weights_at(round(moment * (self.steps - 1))).values()) > 0:
                raise ValueError(f"data: all weights are 0 at {moment:.0%} of the stage")
        if self.loss == "align" and (
            given := self.changed("trainable", "freeze_qk", "activation_checkpointing", "sparse", "logits_scaling")
        ):
            raise ValueError(f"{given} has no effect with loss 'align', which trains the linear twins")
        if self.loss != "distill" and self.weighted:
            raise ValueError(f"weighted is for loss 'distill'; {self.loss!r} has it fixed")
        if self.loss != "align" and self.clip_per_layer:
            raise ValueError("clip_per_layer is for loss 'align', where the layers are independent problems")
        return self


def require_mesh_fits(stage: Stage, mesh: Mesh, place: str) -> None:
    """Raise ValueError, with what would be right, when a stage's windows cannot be split over the mesh."""
    if stage.batch % mesh.data_parallel:
        raise ValueError(
            f"{place}{stage.batch} windows a batch do not divide over {mesh.data_parallel} data-parallel ranks; "
            f"expected one of {divisors(stage.batch)}"
        )
    share = stage.batch // mesh.data_parallel
    if stage.micro_batch is not None and share % stage.micro_batch:
        raise ValueError(
            f"{place}{share} windows of each rank are not a multiple of micro_batch {stage.micro_batch}; "
            f"expected one of {divisors(share)}"
        )
    if stage.length % mesh.cp:
        raise ValueError(
            f"{place}{stage.length} tokens do not divide over {mesh.cp} context-parallel ranks; expected "
            f"{stage.length // mesh.cp * mesh.cp:,} or {(stage.length // mesh.cp + 1) * mesh.cp:,}"
        )


def auto_mesh(stage: Stage, ranks: int) -> Mesh:
    """Return the mesh of `ranks` processes that splits a stage's windows over as many of them as it can.

    Raises:
        RecipeError: no mesh of so many fits.
    """
    for copies in range(ranks, 0, -1):
        if ranks % copies == 0:
            mesh = Mesh(dp_shard=copies, cp=ranks // copies)
            try:
                require_mesh_fits(stage, mesh, "")
            except ValueError:
                continue
            return mesh
    raise RecipeError(
        f"stage {stage.name!r}: {stage.batch} windows of {stage.length:,} tokens divide over no mesh of {ranks} processes; "
        f"expected a divisor of {stage.batch * stage.length:,}"
    )
