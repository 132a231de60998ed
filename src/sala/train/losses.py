"""The three losses, in float32: alignment of hidden states, distillation, next token."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# float32 logits of one model that are held at once: 128 MiB
CHUNK_LOGITS = 2**25


class Head(NamedTuple):
    """What makes logits of final hidden states: weight_XD (h / divisor)."""

    weight_XD: Tensor
    divisor: float = 1.0

    def scaled(self, hidden_CD: Tensor) -> Tensor:
        return hidden_CD if self.divisor == 1 else hidden_CD / self.divisor

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return logits (C, X), float32 unless the states are float64."""
        logits_CX = self.scaled(hidden_CD) @ self.weight_XD.T
        return logits_CX.to(torch.promote_types(logits_CX.dtype, torch.float32))


# (rows, their logits) -> their losses; the logits are overwritten by the losses' gradients to them
Terms = Callable[[Tensor, Tensor], Tensor]


def align(pairs: Sequence[tuple[Tensor, Tensor]], real_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (loss, sizes) of linear twins against the attention outputs they stand beside.

    Args:
        pairs: for every layer (student, teacher), each (B, T, D) after the output projection.
        real_BT: False where a token is padding, which is left out.

    The loss is the mean over layers of the mean squared error (HALO section 4.1). The sizes (2, layers), detached, are the
    means of |student - teacher|^2 and of |teacher|^2: of parts of a batch they add up, where their ratio does not.
    """
    errors, sizes = [], []
    for student_BTD, teacher_BTD in pairs:
        target_BTD = teacher_BTD.detach().float()
        errors_BT = (student_BTD.float() - target_BTD).square().mean(dim=-1)
        sizes_BT = target_BTD.square().mean(dim=-1)
        if real_BT is not None:
            errors_BT, sizes_BT = errors_BT.where(real_BT, 0), sizes_BT.where(real_BT, 0)
        # a rank may hold nothing but padding
        count = sizes_BT.numel() if real_BT is None else real_BT.sum().clamp(min=1)
        errors.append(errors_BT.sum() / count)
        sizes.append(sizes_BT.sum() / count)
    return torch.stack(errors).mean(), torch.stack([torch.stack(errors).detach(), torch.stack(sizes)])


class _WeightedSum(torch.autograd.Function):
    """The weighted sum of losses of logits, with at most `chunk` rows of logits at any time.

    The gradients to hidden states and head are made beside the losses, while a chunk's logits are there: the backward pass
    only scales them, and nothing is computed twice. Rows without weight are not looked at.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_XD: Tensor, divisor: float, weights_N: Tensor, chunk: int, terms: Terms
    ) -> Tensor:
        head = Head(weight_XD, divisor)
        trains_hidden, trains_head = ctx.needs_input_grad[:2]
        hidden_gradient_ND = torch.zeros_like(hidden_ND) if trains_hidden else None
        # a sum over thousands of chunks: bfloat16 would lose the late ones
        total_dtype = torch.promote_types(weight_XD.dtype, torch.float32)
        head_gradient_XD = torch.zeros_like(weight_XD, dtype=total_dtype) if trains_head else None
        total = torch.zeros((), dtype=total_dtype, device=hidden_ND.device)
        for rows in weights_N.nonzero().squeeze(1).split(chunk):
            hidden_CD, weights_C = hidden_ND[rows], weights_N[rows].to(total_dtype)
            logits_CX = head.logits(hidden_CD)
            total += (terms(rows, logits_CX) * weights_C).sum()
            if not (trains_hidden or trains_head):
                continue
            gradient_CX = logits_CX.mul_(weights_C[:, None]).to(weight_XD.dtype)
            if hidden_gradient_ND is not None:
                hidden_gradient_ND[rows] = head.scaled(gradient_CX @ weight_XD)
            if head_gradient_XD is not None:
                head_gradient_XD += gradient_CX.T @ head.scaled(hidden_CD)
        ctx.gradients = hidden_gradient_ND, head_gradient_XD, weight_XD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "scaled in place: a loss is differentiated once"
        (hidden_ND, head_XD, dtype), ctx.gradients = ctx.gradients, None
        if hidden_ND is not None:
            hidden_ND.mul_(gradient)
        if head_XD is not None:
            head_XD = head_XD.mul_(gradient).to(dtype)
        return hidden_ND, head_XD, None, None, None, None


def _weighted_mean(hidden_BTD: Tensor, head: Head, weights_BT: Tensor, chunk: int, terms: Terms) -> Tensor:
    weights_N = weights_BT.flatten()
    total = _WeightedSum.apply(hidden_BTD.flatten(0, 1), head.weight_XD, head.divisor, weights_N, chunk, terms)
    # a part without weight, of a batch that has some elsewhere, adds nothing: it is 0 and not 0 / 0
    return total / weights_N.sum(dtype=total.dtype).clamp(min=torch.finfo(total.dtype).tiny)


def distill(
    student_BTD: Tensor,
    student_head: Head,
    teacher_BTD: Tensor,
    teacher_head: Head,
    weights_BT: Tensor | None = None,
    *,
    chunk: int,
) -> Tensor:
    """Return the weighted mean over all tokens of KL(teacher || student) over the full vocabulary, temperature 1.

    Args:
        student_BTD, teacher_BTD: final hidden states.
        weights_BT: weight of each position's distribution, a constant; all 1 when None. A token of weight 0 is not read.
        chunk: tokens whose logits of both models are held at once; the value does not depend on it.

    Source: HALO section 4.3, with log-softmax in float32 and every token counted.
    """
    weights = torch.ones_like(student_BTD[..., 0], dtype=torch.float32) if weights_BT is None else weights_BT
    teacher_ND = teacher_BTD.detach().flatten(0, 1)

    def terms(rows: Tensor, student_CX: Tensor) -> Tensor:
        teacher_CX = teacher_head.logits(teacher_ND[rows])
        teacher_CX -= teacher_CX.logsumexp(dim=-1, keepdim=True)
        student_CX -= student_CX.logsumexp(dim=-1, keepdim=True)
        losses_C = F.kl_div(student_CX, teacher_CX, reduction="none", log_target=True).sum(dim=-1)
        # d KL / d logits = q - p
        student_CX.exp_().sub_(teacher_CX.exp_())
        return losses_C

    return _weighted_mean(student_BTD, student_head, weights, chunk, terms)


def next_token(
    hidden_BTD: Tensor, head: Head, targets_BT: Tensor, weights_BT: Tensor | None = None, *, chunk: int
) -> Tensor:
    """Return the weighted mean cross-entropy of what follows each token.

    Args:
        targets_BT: int64, the token that follows each one (see `following`).
        weights_BT: weight of each prediction, a constant; all 1 when None. Where it is 0 nothing is predicted, whatever
            the target.
        chunk: tokens whose logits are held at once; the value does not depend on it.
    """
    weights = torch.ones_like(targets_BT, dtype=torch.float32) if weights_BT is None else weights_BT
    targets_N = targets_BT.flatten()

    def terms(rows: Tensor, logits_CX: Tensor) -> Tensor:
        targets_C1 = targets_N[rows][:, None]
        logits_CX -= logits_CX.logsumexp(dim=-1, keepdim=True)
        losses_C = -logits_CX.gather(1, targets_C1).squeeze(1)
        # d loss / d logits = q - [target]
        logits_CX.exp_().scatter_add_(1, targets_C1, torch.full_like(targets_C1, -1, dtype=logits_CX.dtype))
        return losses_C

    return _weighted_mean(hidden_BTD, head, weights, chunk, terms)


def following(x_BT: Tensor) -> Tensor:
    """Return what stands after each place of a window, and zero after the last, which predicts nothing: (B, T)."""
    return F.pad(x_BT[:, 1:], (0, 1))
