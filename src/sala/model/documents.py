"""Documents that lie end to end in one row, as callers of transformers mark them, and labels that stay within each."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from sala.errors import InputError
from sala.model.rows import Context

IGNORED = -100


def ends_of_documents(
    length: int,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor | None:
    """Return the ends (N + 1,) of the documents in one row of `length` tokens, None where nothing says that there are several.

    cu_seqlens, cu_seq_lens_q, cu_seq_lens_k: (N + 1,) the ends themselves.
    seq_idx: (1, length) the number of each token's document.
    position_ids: (1, length) or (B, length) positions; where they start anew in a single row a document starts.

    Raises:
        InputError: two of them mark other documents, or several rows are marked.
    """
    marks = {"cu_seqlens": cu_seqlens, "cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
    if seq_idx is not None:
        marks["seq_idx"] = _ends(_one_row("seq_idx", seq_idx, length).diff() != 0, length)
    if position_ids is not None and _starts_anew(position_ids):
        marks["position_ids"] = _ends(_one_row("position_ids", position_ids, length).diff() != 1, length)
    given = {name: ends.cpu() for name, ends in marks.items() if ends is not None}
    if not given:
        return None
    (first, ends), *others = given.items()
    for name, other in others:
        if other.tolist() != ends.tolist():
            raise InputError(f"{name} marks the ends {other.tolist()}; expected those of {first}, {ends.tolist()}")
    return ends


def ends_of_call(
    length: int,
    cache: Cache | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    context: Context | None,
    kwargs: Mapping[str, Any],
) -> Tensor | None:
    """Return the ends of the documents in a forward call, by whatever it was told of them; None: each row is one."""
    if context is not None:
        # those of the whole row, of which other ranks hold parts
        return cu_seqlens
    marks = {name: kwargs[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if name in kwargs}
    # with a mask or after a cache positions are a count
    alone = attention_mask is None and (cache is None or cache.get_seq_length() == 0)
    return ends_of_documents(length, cu_seqlens=cu_seqlens, position_ids=position_ids if alone else None, **marks)


def labels_within(labels: Tensor, ends: Tensor) -> Tensor:
    """Return labels (1, T) without the first of every document, which the last token of the one before would predict."""
    return labels.index_fill(1, ends[:-1].long().to(labels.device), IGNORED)


def shifted_labels_within(shift_labels: Tensor, ends: Tensor) -> Tensor:
    """Return labels (1, T) that stand at the token that predicts them, without those of another document's first token."""
    return shift_labels.index_fill(1, ends[1:-1].long().to(shift_labels.device) - 1, IGNORED)


def _starts_anew(position_ids: Tensor) -> bool:
    # what is no count at all is refused where positions are compared
    return position_ids.ndim == 2 and bool((position_ids[:, 1:] == 0).any())


def _one_row(name: str, ids_BT: Tensor, length: int) -> Tensor:
    if tuple(ids_BT.shape) != (1, length):
        raise InputError(
            f"{name} of shape {tuple(ids_BT.shape)} marks documents; expected them end to end in one row, (1, {length})"
        )
    return ids_BT[0]


def _ends(starts_T: Tensor, length: int) -> Tensor:
    inner_N = starts_T.cpu().nonzero().flatten() + 1
    return torch.cat((inner_N.new_zeros(1), inner_N, inner_N.new_full((1,), length)))
