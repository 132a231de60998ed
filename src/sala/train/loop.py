"""The one loop: stages of steps, each step a loss, a check, a clip and a move."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sala.errors import SalaError
from sala.train import losses
from sala.train.compile import Compiled
from sala.train.optimizer import make_optimizers
from sala.train.recipe import Optimizer, Stage


class Batch(Protocol):
    """What a step reads: token ids (B, T), the weight of each as a target (B, T), and where each window came from."""

    input_ids: Tensor
    loss_weights: Tensor
    names: Sequence[str]


Batches = Callable[[int], Batch]


@dataclass(frozen=True, slots=True)
class Progress:
    """One step as an observer sees it; `step` counts from 1, `tokens` are those of the stage so far.

    mfu: model FLOPs utilisation, None where the device's peak is not known. memory_bytes: peak of the device's memory, or
    of the process's resident memory; 0 where the system does not tell. stage_index: the stage's place in the recipe.
    layer_errors: empty but in alignment.
    """

    stage: str
    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_s: float
    seconds_left: float
    layer_errors: tuple[float, ...] = ()
    mfu: float | None = None
    memory_bytes: int = 0
    stage_index: int = 0


Observer = Callable[[Progress], None]


# of a token that nothing predicts, in a weighted distillation
LEAST_DISTILLATION_WEIGHT = 0.1


class NonFiniteError(SalaError):
    """A loss or gradient that is not a finite number; the parameters are those from before the step."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A micro-batch: `share` is its part of the batch's loss; `loss_weights` (B, T) belong to the tokens as targets."""

    input_ids: Tensor
    loss_weights: Tensor
    share: float
    # of a distillation that weighs its tokens
    weighted: bool


def _align(model: nn.Module, teacher: nn.Module | None, part: _Part) -> tuple[Tensor, Tensor | None]:
    return losses.align(model(part.input_ids))


def _hidden(model: Any, input_ids: Tensor) -> Tensor:
    return model.model(input_ids, use_cache=False).last_hidden_state


def _head(model: Any) -> losses.Head:
    return losses.Head(model.lm_head.weight, model.logits_divisor)


def _chunk(model: Any) -> int:
    """Tokens whose logits are held at once."""
    return max(1, losses.CHUNK_LOGITS // model.config.vocab_size)


def _distillation_weights(loss_weights_BT: Tensor) -> Tensor:
    """Return the weight of each position's distribution: that of the token after it, and never none."""
    shifted = torch.nn.functional.pad(loss_weights_BT[:, 1:], (0, 1))
    return shifted.clamp(min=LEAST_DISTILLATION_WEIGHT)


def _distill(model: Any, teacher: Any, part: _Part) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        teacher_BTD = _hidden(teacher, part.input_ids)
    student_BTD = _hidden(model, part.input_ids)
    weights_BT = _distillation_weights(part.loss_weights) if part.weighted else None
    loss = losses.distill(student_BTD, _head(model), teacher_BTD, _head(teacher), weights_BT, chunk=_chunk(model))
    return loss, None


def _next_token(model: Any, teacher: nn.Module | None, part: _Part) -> tuple[Tensor, Tensor | None]:
    hidden_BTD = _hidden(model, part.input_ids)
    loss = losses.next_token(hidden_BTD, _head(model), part.input_ids, part.loss_weights, chunk=_chunk(model))
    return loss, None


LOSSES: dict[str, Callable[[Any, Any, _Part], tuple[Tensor, Tensor | None]]] = {
    "align": _align,
    "distill": _distill,
    "next_token": _next_token,
}


def _parts(batch: Batch, stage: Stage) -> list[_Part]:
    """Split a batch into micro-batches whose losses, by share, add up to the whole batch's loss."""
    size = stage.micro_batch or stage.batch
    rows = [(batch.input_ids[i : i + size], batch.loss_weights[i : i + size]) for i in range(0, stage.batch, size)]
    # the loss is a weighted mean, so parts count by their weight
    if stage.loss == "next_token":
        totals = [float(weights[:, 1:].sum()) for _, weights in rows]
    elif stage.weighted:
        totals = [float(_distillation_weights(weights).sum()) for _, weights in rows]
    else:
        totals = [float(ids.numel()) for ids, _ in rows]
    if not sum(totals):
        # a mean over nothing: the loss is not a number, and the loop stops at it
        return [_Part(*rows[0], math.nan, stage.weighted)]
    shares = [part / sum(totals) for part in totals]
    return [
        _Part(ids, weights, share, stage.weighted) for (ids, weights), share in zip(rows, shares, strict=True) if share
    ]


# modules of a mixer that make queries and keys
QUERIES_AND_KEYS = ("q_proj", "k_proj", "q_norm", "k_norm")


def trainable_parameters(model: nn.Module, what: str, *, freeze_qk: bool = False) -> dict[str, nn.Parameter]:
    """Return by name the parameters that a stage trains: "linear_attention", "mixers" or "all".

    A stage of alignment trains the module of linear twins, all of it.

    Args:
        freeze_qk: leave out what makes queries and keys.

    Raises:
        SalaError: this chooses nothing, or the model makes keys and values in one projection.
    """
    named = dict(model.named_parameters())
    if freeze_qk:
        if any("kv_b_proj" in name for name in named):
            raise SalaError("freeze_qk: latent attention makes keys and values in one projection; right would be false")
        named = {name: tensor for name, tensor in named.items() if not set(name.split(".")) & {*QUERIES_AND_KEYS}}
    if what == "all":
        return named
    kinds: Sequence[str] = model.config.mixer_types  # type: ignore[union-attr, assignment]
    chosen = [i for i, kind in enumerate(kinds) if what == "mixers" or kind == "lightning-attn"]
    if not chosen:
        raise SalaError(f"trainable: {what} chooses nothing in a model with mixers {', '.join(sorted(set(kinds)))}")
    prefixes = tuple(f"model.layers.{i}.self_attn." for i in chosen)
    return {name: parameter for name, parameter in named.items() if name.startswith(prefixes)}


def _groups_to_clip(named: dict[str, nn.Parameter], stage: Stage) -> list[list[nn.Parameter]]:
    if not stage.clip_per_layer:
        return [list(named.values())]
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault(next(part for part in name.split(".") if part.isdigit()), []).append(parameter)
    return list(groups.values())


def _require_finite(what: str, value: float, stage: Stage, step: int, batch: Batch) -> None:
    if not math.isfinite(value):
        windows: dict[str, list[str]] = {}
        for index, name in enumerate(batch.names):
            windows.setdefault(name, []).append(str(index))
        held = "; ".join(f"{name} in window {', '.join(indices)}" for name, indices in windows.items())
        raise NonFiniteError(
            f"{what} is {value} at step {step} of stage {stage.name!r}, before the optimizer moved; the batch holds "
            f"{held}. Lower the learning rate, or look at these documents"
        )


def _checkpoint_layers(model: Any, on: bool) -> None:
    # the model's own switch also asks for a gradient at the embeddings, which frozen layers below would have to carry
    for layer in model.model.layers:
        layer.gradient_checkpointing = on
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


@contextmanager
def _training_only(model: Any, named: dict[str, nn.Parameter], activation_checkpointing: bool) -> Iterator[None]:
    """Gradients for `named` alone inside `with`; as before, and none left over, after it."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named)
    model.train()
    if activation_checkpointing:
        _checkpoint_layers(model, True)
    try:
        yield
    finally:
        if activation_checkpointing:
            _checkpoint_layers(model, False)
        model.eval()
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


def _layers_to_compile(model: Any, teacher: Any, stage: Stage) -> list[nn.Module]:
    if stage.loss == "align":
        return list(model.compilable())
    return [*model.model.layers, *(teacher.model.layers if stage.loss == "distill" else ())]


def _backward(model: nn.Module, teacher: Any, stage: Stage, batch: Batch) -> tuple[float, tuple[float, ...]]:
    """Leave the gradients of the batch's loss in the parameters; return the loss and the errors of the layers."""
    model.zero_grad(set_to_none=True)
    loss, errors = 0.0, []
    for part in _parts(batch, stage):
        part_loss, part_errors = LOSSES[stage.loss](model, teacher, part)
        (part_loss * part.share).backward()
        loss += part_loss.item() * part.share
        if part_errors is not None:
            errors.append(part_errors * part.share)
    return loss, tuple(torch.stack(errors).sum(dim=0).tolist()) if errors else ()


def run_stage(
    model: Any,
    stage: Stage,
    batches: Batches,
    *,
    optimizer: Optimizer,
    observer: Observer,
    teacher: Any = None,
    compile_mode: Literal["auto", "on", "off"] = "auto",
) -> Progress:
    """Train `model` in place through one stage and return its last step.

    Args:
        model: for loss "align" a module that returns pairs (see `losses.align`) for token ids; else a causal model.
        batches: step (from 0) -> batch of `stage.batch` windows.
        teacher: needed by loss "distill"; never changed.

    Raises:
        NonFiniteError: a loss or gradient is not finite; nothing has moved in that step.
    """
    named = trainable_parameters(model, "all" if stage.loss == "align" else stage.trainable, freeze_qk=stage.freeze_qk)
    optimizers = make_optimizers(named, optimizer)
    groups = _groups_to_clip(named, stage)
    layers = _layers_to_compile(model, teacher, stage)
    tokens, started = stage.batch * stage.length, time.perf_counter()
    with _training_only(model, named, stage.activation_checkpointing), Compiled(layers, compile_mode) as compiled:
        for step in range(stage.steps):
            batch = batches(step)
            loss, errors = compiled.run(partial(_backward, model, teacher, stage, batch))
            _require_finite("the loss", loss, stage, step, batch)
            norm = torch.stack([nn.utils.clip_grad_norm_(group, optimizer.clip) for group in groups]).norm().item()
            _require_finite("the gradient's norm", norm, stage, step, batch)
            rate = stage.learning_rate.at(step, stage.steps)
            optimizers.step(rate)
            seconds = time.perf_counter() - started
            progress = Progress(
                stage=stage.name,
                step=step + 1,
                steps=stage.steps,
                loss=loss,
                learning_rate=rate,
                gradient_norm=norm,
                tokens=(step + 1) * tokens,
                tokens_per_s=(step + 1) * tokens / seconds,
                seconds_left=seconds / (step + 1) * (stage.steps - step - 1),
                layer_errors=errors,
            )
            observer(progress)
    return progress
