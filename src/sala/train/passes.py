"""One forward pass of a stage: a micro-batch, the loss that its stage asks for, and the modules to shard together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sala.recipe import Stage
from sala.train import losses
from sala.train.batches import WindowBatch
from sala.train.parallel import Parallel

# of a token that nothing predicts, in a weighted distillation
LEAST_DISTILLATION_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward pass reads: (B, T) each, or the rank's piece of one packed row, (1, N).

    targets: what follows each token; target_weights: how much that prediction counts. real: False on padding, None when
    there is none. cu_seqlens: the ends of the packed row's sequences, on all ranks, on the CPU, where the model reads them;
    context: who has the rest of the row.
    """

    input_ids: Tensor
    targets: Tensor
    target_weights: Tensor
    real: Tensor | None = None
    cu_seqlens: Tensor | None = None
    context: Any = None

    @property
    def num_real(self) -> float:
        return float(self.input_ids.numel() if self.real is None else self.real.sum())


def _inputs(part: MicroBatch) -> dict[str, Any]:
    if part.cu_seqlens is None:
        return {"input_ids": part.input_ids}
    packed: dict[str, Any] = {"input_ids": part.input_ids, "cu_seqlens": part.cu_seqlens}
    return packed if part.context is None else packed | {"context": part.context}


def _hidden(model: Any, part: MicroBatch) -> Tensor:
    return model.model(**_inputs(part), use_cache=False).last_hidden_state


def _head(model: Any) -> losses.Head:
    return losses.Head(model.lm_head.weight, model.logits_divisor)


def _chunk(model: Any) -> int:
    """Tokens whose logits are held at once."""
    return max(1, losses.CHUNK_LOGITS // model.config.vocab_size)


def _align(model: Any, teacher: Any, part: MicroBatch, stage: Stage) -> tuple[Tensor, Tensor | None]:
    return losses.align(model(**_inputs(part)), part.real)


def _distill(model: Any, teacher: Any, part: MicroBatch, stage: Stage) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        teacher_BTD = _hidden(teacher, part)
    student_BTD = _hidden(model, part)
    weights_BT = _distillation_weights(part, stage)
    return losses.distill(student_BTD, _head(model), teacher_BTD, _head(teacher), weights_BT, chunk=_chunk(model)), None


def _distillation_weights(part: MicroBatch, stage: Stage) -> Tensor:
    """Return the weight of each position's distribution: 1, or with `weighted` that of the target; 0 on padding."""
    weights = part.target_weights.clamp(min=LEAST_DISTILLATION_WEIGHT)
    if not stage.weighted:
        weights = torch.ones_like(weights)
    return weights if part.real is None else weights.where(part.real, 0)


def _next_token(model: Any, teacher: Any, part: MicroBatch, stage: Stage) -> tuple[Tensor, Tensor | None]:
    hidden_BTD = _hidden(model, part)
    return losses.next_token(hidden_BTD, _head(model), part.targets, part.target_weights, chunk=_chunk(model)), None


@dataclass(frozen=True, slots=True)
class Loss:
    """A row of `LOSSES`.

    of: the mean loss of a part, and in alignment the layers' sizes (`losses.align`). weight: what a part counts in the batch's mean.
    """

    of: Callable[[Any, Any, MicroBatch, Stage], tuple[Tensor, Tensor | None]]
    weight: Callable[[MicroBatch, Stage], float]


LOSSES = {
    "align": Loss(_align, lambda part, stage: part.num_real),
    "distill": Loss(_distill, lambda part, stage: float(_distillation_weights(part, stage).sum())),
    "next_token": Loss(_next_token, lambda part, stage: float(part.target_weights.sum())),
}


def micro_batches(batch: WindowBatch, size: int | None, parallel: Parallel) -> list[MicroBatch]:
    """Split this rank's windows into micro-batches of `size`, and with context parallelism each of these over its ranks."""
    windows = len(batch.input_ids)
    size = size or windows
    return [micro_batch_of(batch.rows(start, start + size), parallel) for start in range(0, windows, size)]


def micro_batch_of(batch: WindowBatch, parallel: Parallel) -> MicroBatch:
    """Return what a rank reads of some windows, on its device."""
    # shifted before windows are cut: the last token of a rank's piece is followed by the next rank's first
    tensors = [batch.input_ids, losses.following(batch.input_ids), losses.following(batch.loss_weights), batch.padding]
    packed = batch.ends is not None or parallel.context is not None
    if packed:
        tensors = [None if x is None else parallel.own_piece(x.reshape(1, -1)) for x in tensors]
    ids, targets, weights, padding = (None if x is None else x.to(parallel.device) for x in tensors)
    assert ids is not None and targets is not None and weights is not None
    return MicroBatch(
        ids,
        targets,
        weights,
        None if padding is None else ~padding,
        batch.cu_seqlens if packed else None,
        parallel.context,
    )


class Pass(nn.Module):
    """The forward pass of a stage: the root of everything whose parameters are sharded together."""

    def __init__(self, model: nn.Module, teacher: nn.Module | None, stage: Stage):
        super().__init__()
        self.model = model
        # linear twins stand beside a teacher that is no submodule of theirs
        self.teacher = getattr(model, "teacher", None) if stage.loss == "align" else teacher
        self.stage = stage

    def forward(self, part: MicroBatch, loss: str | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the stage's loss of a micro-batch, or another one of `LOSSES`, and the sizes of `losses.align`."""
        return LOSSES[loss or self.stage.loss].of(self.model, self.teacher, part, self.stage)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules that are gathered one at a time: layers, and twins."""
        own: Any = self.model.compilable() if self.stage.loss == "align" else self.model.model.layers  # type: ignore[operator, union-attr]
        teacher: Any = self.teacher
        return [*own, *([] if teacher is None else teacher.model.layers)]

    @property
    def compilable(self) -> list[nn.Module]:
        """The blocks that run often enough, and alike enough, to be compiled."""
        return list(self.model.compilable()) if self.stage.loss == "align" else self.blocks  # type: ignore[operator]

    @property
    def checkpointed(self) -> list[nn.Module]:
        """The layers that keep no activations."""
        return list(self.model.model.layers) if self.stage.activation_checkpointing else []  # type: ignore[union-attr, arg-type]
