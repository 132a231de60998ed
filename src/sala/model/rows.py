"""Where the tokens of one forward call stand: their positions, which of them are padding, and how rows are packed."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sala.errors import InputError
from sala.ops.context import Context
from sala.ops.packing import spans_of

__all__ = ["Context", "Packing", "Rows", "place_rows", "place_steps"]


class Packing:
    """How documents lie end to end in one row of tokens.

    A plain class: torch.compile does not look into what only functions that it leaves alone read, and so does not compile
    again for the next batch's documents.

    cu_seqlens: (N + 1,) int on the device, sent there once for all layers: the documents' ends in the whole row.
    cu_seqlens_cpu: the same on the CPU.
    context: the ranks that hold the row together, each an equal part of it; None: this process holds all of it.
    spans: the documents that have tokens here.
    """

    def __init__(self, cu_seqlens_cpu: Tensor, num_tokens: int, device: torch.device, context: Context | None = None):
        # to a GPU without waiting for it
        self.cu_seqlens = cu_seqlens_cpu.to(device, non_blocking=device.type == "cuda")
        self.cu_seqlens_cpu = cu_seqlens_cpu
        self.context = context
        self.spans = spans_of(cu_seqlens_cpu, num_tokens, context)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Packing":
        moved = copy(self)
        moved.cu_seqlens = self.cu_seqlens.to(device, non_blocking=non_blocking)
        return moved


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every row's new tokens are at start .. start + T - 1."""

    start: int


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of a padded batch, which begin and end where they like.

    begins, ends: how many tokens each row has before this call and after it.
    tokens: row, column and position of every token that is no padding, int64 (N,) on the device.
    """

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    tokens: tuple[Tensor, Tensor, Tensor]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Ragged":
        row_N, column_N, position_N = (x.to(device, non_blocking=non_blocking) for x in self.tokens)
        return replace(self, tokens=(row_N, column_N, position_N))


@dataclass(frozen=True, slots=True)
class Recorded:
    """One new token a row, at positions that only the device knows: what is launched is the same whatever they are.

    capacity: the places of the cache that are in use.
    windows: of each tier of compressed keys every row's newest complete window (B,) and its keys' places (B, C), int64.
    """

    capacity: int
    windows: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, slots=True)
class Pages:
    """Rows of requests, whose memory is in a `PagedCache`.

    table_BP: int32, the numbers of each row's pages; what lies behind its last is any page.
    places_N: int64, where keys and values of the new tokens go, counted through all pages; padding has none.
    slots_2B: int64, the slots that states are read from (-1: none yet) and written to.
    windows: of each tier of compressed keys the places of new windows (N,) and those of their keys (N, C), int64.
    start: where the only row's new tokens begin; None for several rows.
    """

    table_BP: Tensor
    places_N: Tensor
    slots_2B: Tensor
    windows: tuple[tuple[Tensor, Tensor], ...]
    start: int | None


@dataclass(frozen=True, slots=True)
class Rows:
    """The places of new tokens, the same for every layer of one call.

    positions_BT: int64, counted from the start of each sequence, cache included; -1 marks padding.
    layout: how rows stand to one another and to their memory.
    mask_BT: bool, False on padding; None when no token is padding.
    rotation: cosine and sine of the rotary embedding, (B or 1, T, R) float32 for R pairs; None when no layer rotates.
    """

    positions_BT: Tensor
    layout: Uniform | Ragged | Packing | Recorded | Pages
    mask_BT: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Rows":
        """Return the same places on another device: accelerate asks for them where a layer's weights are."""
        if self.positions_BT.device == torch.device(device):
            return self
        if isinstance(self.layout, Recorded | Pages):
            raise InputError(f"a recorded step or a paged cache on {self.positions_BT.device}; expected one device")
        layout = self.layout if isinstance(self.layout, Uniform) else self.layout.to(device, non_blocking)
        mask, rotation = (_sent(x, device, non_blocking) for x in (self.mask_BT, self.rotation))
        return Rows(_sent(self.positions_BT, device, non_blocking), layout, mask, rotation)

    @property
    def start(self) -> int | None:
        """Position of the first new token of every row, None where rows differ or it is not known."""
        return self.layout.start if isinstance(self.layout, Uniform | Pages) else None

    @property
    def ragged(self) -> Ragged | None:
        return self.layout if isinstance(self.layout, Ragged) else None

    @property
    def packing(self) -> Packing | None:
        return self.layout if isinstance(self.layout, Packing) else None

    @property
    def recorded(self) -> Recorded | None:
        return self.layout if isinstance(self.layout, Recorded) else None

    @property
    def pages(self) -> Pages | None:
        return self.layout if isinstance(self.layout, Pages) else None

    @property
    def page_table_BP(self) -> Tensor | None:
        return self.layout.table_BP if isinstance(self.layout, Pages) else None

    @property
    def static(self) -> bool:
        """Whether the positions are on a device that a layer must not wait for."""
        if isinstance(self.layout, Recorded):
            return True
        if isinstance(self.layout, Ragged):
            return torch.compiler.is_exporting() or not self.positions_BT.is_cpu
        return isinstance(self.layout, Pages) and self.start is None and not self.positions_BT.is_cpu

    def in_order(self, new_BT: Tensor) -> Tensor:
        """Return keys or values (B, S, ...) of a call without a cache, the one of position p at index p, behind a row's end zeros."""
        if self.ragged is None:
            return new_BT
        row_N, column_N, position_N = self.ragged.tokens
        ordered_BS = new_BT.new_zeros(new_BT.shape[0], max(self.ragged.ends), *new_BT.shape[2:])
        return ordered_BS.index_put((row_N, position_N), new_BT[row_N, column_N])


def _sent(value: Any, device: torch.device | str | int, non_blocking: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_sent(item, device, non_blocking) for item in value)
    return None if value is None else value.to(device, non_blocking=non_blocking)


def place_rows(
    batch: int,
    length: int,
    past: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    context: Context | None = None,
) -> Rows:
    """Return the places of `length` new tokens after `past` columns of a cache.

    attention_mask: (B, past + length), 0 or False on padding anywhere; a row's positions count its real tokens only.
    cu_seqlens: (N + 1,) ends of the sequences packed into one row: with a context those of the whole row, of which this
        rank holds `length` tokens. Where it lies on the CPU no device is waited for.

    Raises:
        InputError: the mask has another shape; packed rows meet a cache, a mask or a batch; ranks share a row that is
            not packed.
    """
    if cu_seqlens is not None:
        if past or batch != 1 or attention_mask is not None:
            raise InputError(
                f"documents are packed into one row, without a cache or a mask; got {batch} rows, {past} cached tokens and "
                f"{'a' if attention_mask is not None else 'no'} mask"
            )
        return _place_packed(length, cu_seqlens.cpu(), device, context)
    if context is not None:
        raise InputError(
            f"a context of {context.ranks} ranks without cu_seqlens: ranks share a packed row; expected "
            f"cu_seqlens from 0 to {context.ranks * length}, the tokens of all of them"
        )
    if attention_mask is None:
        return Rows(torch.arange(past, past + length, device=device).expand(batch, length), Uniform(past))
    if attention_mask.ndim != 2 or attention_mask.shape != (batch, past + length):
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected ({batch}, {past + length}): "
            f"{past} tokens in the cache and {length} new ones"
        )
    real = attention_mask.bool()
    if torch.compiler.is_exporting():
        return _place_traced(real, past)
    # all that is ever asked of a mask, where it lies
    is_mask = (attention_mask == real).all(1)
    ends, new_tokens, fits = torch.stack([real.sum(1), real[:, past:].sum(1), is_mask.long()]).tolist()
    if not all(fits):
        raise InputError(
            f"row {fits.index(0)} of attention_mask has other values than 0 and 1; expected 0 on padding and 1 elsewhere "
            "(documents in one row are marked by cu_seqlens, seq_idx or position_ids)"
        )
    if all(end == past + length for end in ends):
        return place_rows(batch, length, past, device)
    real = real.to(device, non_blocking=device.type == "cuda")
    positions = (real.long().cumsum(dim=1) - 1)[:, past:]
    mask = real[:, past:]
    # those that are no padding come first, in their order
    order_N = (~mask).flatten().int().argsort(stable=True)[: sum(new_tokens)]
    row_N, column_N = order_N // length, order_N % length
    return Rows(
        positions.masked_fill(~mask, -1),
        Ragged(
            tuple(end - new for end, new in zip(ends, new_tokens, strict=True)),
            tuple(ends),
            (row_N, column_N, positions[row_N, column_N]),
        ),
        mask_BT=mask,
    )


def _place_traced(real_BS: Tensor, past: int) -> Rows:
    """Return places by shapes alone, for a program that has not seen the mask: padding stands behind a row's last token.

    Raises:
        InputError: after a cache, whose lengths such a program does not know.
    """
    if past:
        raise InputError(f"a mask after {past} tokens of a cache cannot be exported; expected use_cache=False")
    B, T = real_BS.shape
    place_BT = torch.where(
        real_BS, real_BS.long().cumsum(1) - 1, real_BS.sum(1, keepdim=True) + (~real_BS).long().cumsum(1) - 1
    )
    row_N = torch.arange(B, device=real_BS.device).repeat_interleave(T)
    column_N = torch.arange(T, device=real_BS.device).repeat(B)
    return Rows(
        place_BT.masked_fill(~real_BS, -1),
        Ragged((0,) * B, (T,) * B, (row_N, column_N, place_BT.flatten())),
        mask_BT=real_BS,
    )


def place_steps(position_B: Tensor, batch: int, capacity: int, tiers: Sequence[tuple[int, int]]) -> Rows:
    """Return the places of one new token a row, at positions int64 (B,) or (1,) for all, that only the device knows.

    capacity: as in `Recorded`; what the cache was asked to `hold`, or less.
    tiers: the (size, stride) of each tier of compressed keys.
    """
    position_B = position_B.expand(batch)
    windows = []
    for size, stride in tiers:
        newest_B = ((position_B + 1 - size) // stride).clamp(min=0)
        windows.append((newest_B, newest_B[:, None] * stride + torch.arange(size, device=position_B.device)))
    return Rows(position_B[:, None], Recorded(capacity, tuple(windows)))


def check_positions(position_ids: Tensor | None, positions_BT: Tensor) -> None:
    """Refuse position_ids (B or 1, T) that are not the positions of the new tokens; -1 is padding, whose may be anything.

    Raises:
        InputError: one is not; the message names the first.
    """
    # an exported program cannot raise
    if position_ids is None or torch.compiler.is_exporting():
        return
    differs_BT = (position_ids != positions_BT) & (positions_BT >= 0)
    if bool(differs_BT.any()):
        row, column = differs_BT.nonzero()[0].tolist()
        found, right = (int(ids.expand_as(differs_BT)[row, column]) for ids in (position_ids, positions_BT))
        raise InputError(
            f"position_ids are {found} at token {column} of row {row}; expected {right}: positions count a row's tokens "
            "from 0, those of the cache included and padding left out, and start anew only where documents lie in one row"
        )


def _place_packed(length: int, cu_seqlens: Tensor, device: torch.device, context: Context | None) -> Rows:
    ranks = 1 if context is None else context.ranks
    if (
        cu_seqlens.ndim != 1
        or int(cu_seqlens[0]) != 0
        or int(cu_seqlens[-1]) != ranks * length
        or bool((cu_seqlens.diff() <= 0).any())
    ):
        whole = (
            f"the length {length}" if context is None else f"{ranks * length}, {length} tokens on each of {ranks} ranks"
        )
        raise InputError(f"the ends of documents are {cu_seqlens.tolist()}; expected increasing from 0 to {whole}")
    packing = Packing(cu_seqlens, length, device, context)
    first = 0 if context is None else context.rank * length
    place_T = torch.arange(first, first + length, device=device)
    ends_N = packing.cu_seqlens.long()
    start_T = ends_N[torch.searchsorted(ends_N, place_T, right=True) - 1]
    return Rows((place_T - start_T)[None], packing)
