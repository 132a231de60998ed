"""The one loop: stages of steps, each step a loss, a check, a clip and a move."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import nn

from sala.errors import SalaError
from sala.recipe import Optimizer, Stage
from sala.train.batches import Feed, HeldOut, WindowBatch
from sala.train.compile import Compiled
from sala.train.memory import peak_memory_bytes
from sala.train.optimizer import make_optimizers
from sala.train.parallel import ALONE, Parallel, reshard, whole
from sala.train.passes import LOSSES, Pass, micro_batches
from sala.train.trainable import trainable_parameters
from sala.train.weights import PRIVATE, Weights


@dataclass(frozen=True, slots=True)
class Progress:
    """One step as an observer sees it; `step` counts from 1, `tokens` are those of the stage so far.

    mfu: model FLOPs utilisation, None where the device's peak is not known. memory_bytes: peak of the device's memory, or
    of the process's resident memory; 0 where the system does not tell. stage_index: the stage's place in the recipe.
    layer_errors: empty but in alignment. validation_loss: of the held-out windows, alignment's own loss or cross-entropy of the
    next token; None at steps without a look.
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
    validation_loss: float | None = None


Observer = Callable[[Progress], None]


class NonFiniteError(SalaError):
    """A loss or gradient that is not a finite number; the parameters are those from before the step."""


def _groups_to_clip(named: dict[str, nn.Parameter], stage: Stage) -> list[list[nn.Parameter]]:
    if not stage.clip_per_layer:
        return [list(named.values())]
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault(next(part for part in name.split(".") if part.isdigit()), []).append(parameter)
    return list(groups.values())


LOOK = "Lower the learning rate, or look at these documents"
# the first token of a document, padding, and a user's side of a chat are not predicted
NOTHING = "None of its tokens counts in this loss; expected a larger batch, longer windows or other documents"


def _require_finite(
    what: str,
    value: float,
    own: float,
    stage: Stage,
    step: int,
    batch: WindowBatch,
    parallel: Parallel,
    advice: str = LOOK,
) -> None:
    """Stop every rank when `value`, the same on all, is not finite; `own` says whether this rank's part of it is."""
    if math.isfinite(value):
        return
    windows: dict[str, list[str]] = {}
    for index, name in enumerate(batch.names):
        windows.setdefault(name, []).append(str(index))
    mine = "; ".join(f"{name} in window {', '.join(indices)}" for name, indices in windows.items())
    held = parallel.gather(None if math.isfinite(own) else mine)
    where = "; ".join(
        f"{f'rank {rank}: ' if len(held) > 1 else ''}{names}" for rank, names in enumerate(held) if names is not None
    )
    raise NonFiniteError(
        f"{what} is {value} at step {step} of stage {stage.name!r}, before the optimizer moved; the batch holds "
        f"{where}. {advice}"
    )


@contextmanager
def _training_only(model: Any, named: dict[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for `named` alone inside `with`; as before, and none left over, after it."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named)
    model.train()
    try:
        yield
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


@dataclass(frozen=True, slots=True)
class _Measured:
    """A batch's loss over all ranks, this rank's part of it, and of alignment |twin - teacher|^2 / |teacher|^2 a layer.

    weight: of all tokens together; of 0 there is no loss.
    """

    loss: float
    own: float
    weight: float
    layer_errors: tuple[float, ...]


def _backward(root: Any, batch: WindowBatch, stage: Stage, parallel: Parallel) -> _Measured:
    """Leave the gradients of the batch's loss, the mean over the tokens of all ranks, in the parameters."""
    root.zero_grad(set_to_none=True)
    parts, loss = micro_batches(batch, stage.micro_batch, parallel), LOSSES[stage.loss]
    weights = [loss.weight(part, stage) for part in parts]
    total = parallel.sum([sum(weights)])[0]
    # a mean over nothing: the loss is not a number, and the loop stops at it
    shares = [weight / total if total else math.nan for weight in weights]
    own, layers = 0.0, torch.zeros(2, 0)
    for part, share in zip(parts, shares, strict=True):
        part_loss, part_layers = root(part)
        # sharding averages gradients over ranks, where shares are to add up
        (part_loss * (share * parallel.ranks)).backward()
        own += part_loss.item() * share
        if part_layers is not None:
            part_layers = part_layers.cpu() * share
            layers = layers + part_layers if layers.numel() else part_layers
    added, *sums = parallel.sum([own, *layers.flatten().tolist()])
    errors, sizes = sums[: len(sums) // 2], sums[len(sums) // 2 :]
    return _Measured(added, own, total, tuple(error / size for error, size in zip(errors, sizes, strict=True)))


@torch.no_grad()
def _validation_loss(root: Any, held_out: HeldOut, stage: Stage, parallel: Parallel) -> float:
    """Return the mean loss of the held-out windows of all ranks: alignment's, else cross-entropy of the next token."""
    name = "align" if stage.loss == "align" else "next_token"
    size = stage.micro_batch or max(1, stage.batch // parallel.mesh.data_parallel)
    parts = micro_batches(held_out.batch, size, parallel)
    weights = [LOSSES[name].weight(part, stage) for part in parts]
    added = sum(root(part, name)[0].item() * weight for part, weight in zip(parts, weights, strict=True))
    reshard(root)
    total_loss, total = parallel.sum([added, sum(weights)])
    return total_loss / total if total else math.nan


def _gradient_norm(groups: Sequence[list[nn.Parameter]], clip: float) -> float:
    """Clip each group to `clip` and return the norm of all gradients before."""
    norms = [whole(nn.utils.clip_grad_norm_(group, clip)) for group in groups]
    return torch.stack(norms).norm().item()


class _Clock:
    """Speed, time left and memory of a stage, counted from where this process began.

    model_flops: of a step over all ranks, and the peak of one rank's device in FLOP/s; None where that is not known.
    """

    def __init__(self, stage: Stage, first: int, parallel: Parallel, model_flops: tuple[int, float] | None):
        self.stage, self.first, self.parallel, self.model_flops = stage, first, parallel, model_flops
        self.started = time.perf_counter()

    def read(self, done: int) -> dict[str, Any]:
        seconds = (time.perf_counter() - self.started) / (done - self.first)
        mfu = None
        if self.model_flops is not None:
            flops, peak = self.model_flops
            mfu = flops / (seconds * self.parallel.ranks * peak)
        return {
            "tokens_per_s": self.stage.batch * self.stage.length / seconds,
            "seconds_left": seconds * (self.stage.steps - done),
            "mfu": mfu,
            "memory_bytes": peak_memory_bytes(self.parallel.device),
        }


class Saver(Protocol):
    """What outlives the process: told of every step, and asked where a stage was left."""

    def restore(self, state: dict[str, Any], feed: Feed) -> Progress | None:
        """Put tensors and feed where the stage was left, and return its last step; None: it is new."""
        ...

    def after(self, progress: Progress, state: Callable[[], dict[str, Any]], feed: Feed) -> None:
        """Take note of a step that is done."""
        ...


def run_stage(
    model: Any,
    stage: Stage,
    feed: Feed,
    *,
    optimizer: Optimizer,
    observer: Observer,
    teacher: Any = None,
    compile_mode: Literal["auto", "on", "off"] = "auto",
    parallel: Parallel = ALONE,
    weights: Weights = PRIVATE,
    saver: Saver | None = None,
    held_out: HeldOut | None = None,
    stage_index: int = 0,
    model_flops: tuple[int, float] | None = None,
) -> Progress:
    """Train `model` in place through one stage and return its last step.

    Args:
        model: for loss "align" a module that returns pairs (see `losses.align`) for token ids; else a causal model.
        feed: batches of this rank's windows, `stage.batch` over all data-parallel ranks.
        teacher: needed by loss "distill"; never changed.
        parallel: the ranks that share the work.
        weights: where the model's trained parameters go, when the ranks have trained shards of them.
        saver: saves, and continues what was saved.
        held_out: windows to measure the validation loss on.
        model_flops: of a step over all ranks, and the peak FLOP/s of a rank, for the utilisation; None: not known.

    Raises:
        NonFiniteError: a loss or gradient is not finite; nothing has moved in that step.
    """
    chosen = trainable_parameters(model, "all" if stage.loss == "align" else stage.trainable, freeze_qk=stage.freeze_qk)
    with _training_only(model, chosen):
        original = Pass(model, teacher, stage)
        root = parallel.shard(original)
        named = {name: parameter for name, parameter in root.model.named_parameters() if name in chosen}
        optimizers = make_optimizers(named, optimizer)
        groups = _groups_to_clip(named, stage)

        def state() -> dict[str, Any]:
            return {"model": dict(root.model.named_parameters()), "optimizer": optimizers.state}

        progress = saver.restore(state(), feed) if saver is not None else None
        first = 0 if progress is None else progress.step
        clock = _Clock(stage, first, parallel, model_flops)
        with Compiled(root.compilable, compile_mode, root.checkpointed) as compiled:
            for step in range(first, stage.steps):
                batch = next(feed)
                measured = compiled.run(partial(_backward, root, batch, stage, parallel))
                advice = LOOK if measured.weight else NOTHING
                _require_finite("the loss", measured.loss, measured.own, stage, step + 1, batch, parallel, advice)
                norm = _gradient_norm(groups, optimizer.clip)
                _require_finite("the gradient's norm", norm, norm, stage, step + 1, batch, parallel)
                rate = stage.learning_rate.at(step, stage.steps)
                optimizers.step(rate)
                look = held_out is not None and ((step + 1) % held_out.every == 0 or step + 1 == stage.steps)
                progress = Progress(
                    stage=stage.name,
                    step=step + 1,
                    steps=stage.steps,
                    loss=measured.loss,
                    learning_rate=rate,
                    gradient_norm=norm,
                    tokens=(step + 1) * stage.batch * stage.length,
                    layer_errors=measured.layer_errors,
                    stage_index=stage_index,
                    validation_loss=_validation_loss(root, held_out, stage, parallel) if look and held_out else None,
                    **clock.read(step + 1),
                )
                observer(progress)
                if saver is not None:
                    saver.after(progress, state, feed)
        if root is not original:
            # also what this stage did not train: a checkpoint may have brought it
            weights.renew(dict(model.named_parameters()), dict(root.model.named_parameters()))
    assert progress is not None
    return progress
