"""Where the tokens of one forward call stand: their positions, which of them are padding, and how rows are packed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sala.errors import InputError


@dataclass(frozen=True, slots=True)
class Rows:
    """The places of new tokens, the same for every layer of one call.

    positions_BT: int64, counted from the start of each sequence, cache included; -1 marks padding.
    mask_BT: bool, False on padding; None when no token is padding.
    start: position of the first new token when every row holds `start .. start + T - 1`, else None.
    cu_seqlens: (N + 1,) int, ends of packed sequences in the one row; None when rows are not packed.
    rotation: cosine and sine of the rotary embedding, (B or 1, T, R) float32 for R pairs; None when no layer rotates.
    """

    positions_BT: Tensor
    mask_BT: Tensor | None = None
    start: int | None = None
    cu_seqlens: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None


def place_rows(
    batch: int,
    length: int,
    past: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Rows:
    """Return the places of `length` new tokens after `past` columns of a cache.

    attention_mask: (B, past + length), 0 or False on padding anywhere; a row's positions count its real tokens only.

    Raises:
        InputError: the mask has another shape; packed rows meet a cache, a mask or a batch.
    """
    if cu_seqlens is not None:
        return _place_packed(batch, length, past, attention_mask, cu_seqlens)
    if attention_mask is None:
        return Rows(torch.arange(past, past + length, device=device).expand(batch, length), start=past)
    if attention_mask.ndim != 2 or attention_mask.shape != (batch, past + length):
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; right would be ({batch}, {past + length}): "
            f"{past} tokens in the cache and {length} new ones"
        )
    real = attention_mask.to(device=device, dtype=torch.bool)
    if bool(real.all()):
        return place_rows(batch, length, past, device)
    positions = real.long().cumsum(dim=1) - 1
    mask = real[:, past:]
    return Rows(positions[:, past:].masked_fill(~mask, -1), mask_BT=mask)


def _place_packed(batch: int, length: int, past: int, attention_mask: Tensor | None, cu_seqlens: Tensor) -> Rows:
    if past or batch != 1 or attention_mask is not None:
        raise InputError(
            f"cu_seqlens packs several sequences into one row without a cache or a mask; got batch {batch}, "
            f"{past} cached tokens, attention_mask {'given' if attention_mask is not None else 'None'}"
        )
    if (
        cu_seqlens.ndim != 1
        or int(cu_seqlens[0]) != 0
        or int(cu_seqlens[-1]) != length
        or bool((cu_seqlens.diff() <= 0).any())
    ):
        raise InputError(f"cu_seqlens = {cu_seqlens.tolist()}; right would be increasing from 0 to the length {length}")
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long())
    return Rows((torch.arange(length, device=cu_seqlens.device) - starts)[None], cu_seqlens=cu_seqlens)
