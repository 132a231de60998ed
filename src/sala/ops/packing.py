"""Packed rows: documents laid end to end in one row of tokens, of which a rank may hold a part."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sala.errors import InputError
from sala.ops.context import Context

# a longer document is work enough for a call of its own, and padding it to another's length costs more than the call
LONGEST_TOGETHER = 1024


class Span(NamedTuple):
    """The tokens of one document that stand in one part of a packed row; places count from the start of the whole row."""

    document_start: int
    start: int  # the first token in the part
    end: int  # behind the last one in the part
    document_end: int

    @property
    def document_length(self) -> int:
        return self.document_end - self.document_start


def row_bounds(cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """Return `cu_seqlens` (N+1,) as a list, having checked that it cuts `num_tokens` tokens into N documents.

    Raises:
        InputError: not a vector of integers, or not rising from 0 to `num_tokens`.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"cu_seqlens must be a vector of at least two int32 or int64 values, "
            f"not {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    bounds: list[int] = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise InputError(f"cu_seqlens must start at 0, not at {bounds[0]}")
    if bounds[-1] != num_tokens:
        raise InputError(f"cu_seqlens must end at the number of packed tokens, {num_tokens}, not at {bounds[-1]}")
    for start, end in pairwise(bounds):
        if end < start:
            raise InputError(f"cu_seqlens must not fall: {start} is followed by {end}")
    return bounds


def spans_of(cu_seqlens: Tensor, num_tokens: int, context: Context | None = None) -> list[Span]:
    """Return the documents that have tokens in this rank's part of a packed row, in their order.

    Args:
        cu_seqlens: (N+1,) int32 or int64, the documents' ends in the whole row.
        num_tokens: tokens in the part.
        context: the ranks that hold the row; None: the part is the whole.

    Raises:
        InputError: `cu_seqlens` does not cut as many tokens as all parts have.
    """
    rank, ranks = (0, 1) if context is None else (context.rank, context.ranks)
    part_start, part_end = rank * num_tokens, (rank + 1) * num_tokens
    spans = [
        Span(start, max(start, part_start), min(end, part_end), end)
        for start, end in pairwise(row_bounds(cu_seqlens, ranks * num_tokens))
    ]
    return [span for span in spans if span.start < span.end]


def similar_lengths(lengths: Sequence[int], longest: int = LONGEST_TOGETHER) -> list[list[int]]:
    """Return rows in groups that lose little by padding each row to its group's longest, by their indices.

    Within a group lengths differ by less than the square root of two, so that padding less than doubles even work that
    grows with the square of a length. Rows longer than `longest` are alone, rows of length 0 in no group.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for row, length in enumerate(lengths):
        if length:
            key = (row, 0) if length > longest else (-1, (length * length).bit_length())
            groups.setdefault(key, []).append(row)
    return list(groups.values())


def pad_rows(rows: Sequence[Tensor]) -> Tensor:
    """Return rows (n, ...) of several lengths as one tensor (N, L, ...), zeros behind the shorter ones; differentiable."""
    return rows[0][None] if len(rows) == 1 else pad_sequence(list(rows), batch_first=True)
