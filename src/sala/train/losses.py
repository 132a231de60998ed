"""The three losses, in float32: alignment of hidden states, distillation, next token."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# float32 logits of one model that are held at once: 128 MiB
CHUNK_LOGITS = 2**25

Head = Callable[[Tensor], Tensor]


def align(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return (loss, relative errors) of linear twins against the attention outputs they stand beside.

    Args:
        pairs: for every layer (student, teacher), each (B, T, D) after the output projection.

    The loss is the mean over layers of the mean squared error (HALO section 4.1). The errors, one a layer, detached, are
    |student - teacher|^2 / |teacher|^2.
    """
    errors, relative = [], []
    for student_BTD, teacher_BTD in pairs:
        target_BTD = teacher_BTD.detach().float()
        error = F.mse_loss(student_BTD.float(), target_BTD)
        errors.append(error)
        relative.append(error.detach() / target_BTD.square().mean())
    return torch.stack(errors).mean(), torch.stack(relative)


def _in_chunks(terms: Callable[..., Tensor], *rows: Tensor, chunk: int) -> Tensor:
    """Sum `terms` over chunks of rows; each chunk's logits are computed again in the backward pass and never kept."""
    total_rows = rows[0].shape[0]
    if total_rows <= chunk:
        return terms(*rows)
    parts = [
        checkpoint(terms, *(row[start : start + chunk] for row in rows), use_reentrant=False)
        for start in range(0, total_rows, chunk)
    ]
    return torch.stack(parts).sum()


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
        student_BTD, teacher_BTD: final hidden states; `head` turns rows of them (N, D) into logits (N, X).
        weights_BT: weight of each position's distribution; all 1 when None.
        chunk: tokens whose float32 logits of both models are held at once; the value does not depend on it.

    Source: HALO section 4.3, with log-softmax in float32 and every token counted.
    """
    weights = torch.ones_like(student_BTD[..., 0], dtype=torch.float32) if weights_BT is None else weights_BT.float()

    def terms(student_ND: Tensor, teacher_ND: Tensor, weights_N: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_NX = teacher_head(teacher_ND).float().log_softmax(dim=-1)
        student_NX = student_head(student_ND).float().log_softmax(dim=-1)
        divergence_N = F.kl_div(student_NX, teacher_NX, reduction="none", log_target=True).sum(dim=-1)
        return (divergence_N * weights_N).sum()

    total = _in_chunks(terms, student_BTD.flatten(0, 1), teacher_BTD.flatten(0, 1), weights.flatten(), chunk=chunk)
    return total / weights.sum()


def next_token(
    hidden_BTD: Tensor, head: Head, input_ids_BT: Tensor, weights_BT: Tensor | None = None, *, chunk: int
) -> Tensor:
    """Return the weighted mean cross-entropy of each token given those before it.

    Args:
        weights_BT: weight of token t as a target; the first token of a window is never a target. All 1 when None.
        chunk: tokens whose float32 logits are held at once; the value does not depend on it.
    """
    targets_BT = input_ids_BT[:, 1:]
    weights = torch.ones_like(targets_BT, dtype=torch.float32) if weights_BT is None else weights_BT[:, 1:].float()

    def terms(hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        losses_N = F.cross_entropy(head(hidden_ND).float(), targets_N, reduction="none")
        return (losses_N * weights_N).sum()

    total = _in_chunks(terms, hidden_BTD[:, :-1].flatten(0, 1), targets_BT.flatten(), weights.flatten(), chunk=chunk)
    return total / weights.sum()
