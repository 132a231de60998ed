"""Packed sequences: rows of several lengths laid end to end, unpacked into padded rows and packed again."""

from itertools import pairwise

import torch
from torch import Tensor

from sala.errors import InputError


def row_bounds(cu_seqlens: Tensor, num_tokens: int) -> list[int]:
    """Return `cu_seqlens` (N+1,) as a list, having checked that it cuts `num_tokens` tokens into N rows.

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


def unpack(x_1T: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of a packed tensor, padded at their ends with zeros, and which of their entries are tokens.

    Args:
        x_1T: (1, T, ...), the N rows end to end.
        cu_seqlens: (N+1,) int32 or int64; row n holds the tokens cu_seqlens[n] to cu_seqlens[n+1].

    Returns:
        rows (N, L, ...) with L the longest row's length, and their mask (N, L) bool. Differentiable.

    Raises:
        InputError: more than one batch row, or `cu_seqlens` does not fit.
    """
    if x_1T.ndim < 2 or x_1T.shape[0] != 1:
        raise InputError(f"packed tokens are one batch row, (1, T, ...), not of shape {tuple(x_1T.shape)}")
    bounds = row_bounds(cu_seqlens, x_1T.shape[1])
    lengths = [end - start for start, end in pairwise(bounds)]
    rows_NL = torch.nn.utils.rnn.pad_sequence(x_1T[0].split(lengths), batch_first=True)
    columns_L = torch.arange(max(lengths), device=x_1T.device)
    lengths_N = torch.tensor(lengths, device=x_1T.device)
    return rows_NL, columns_L < lengths_N[:, None]


def pack(x_NL: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return padded rows (N, L, ...) end to end, (1, T, ...): the inverse of `unpack`, differentiable.

    Raises:
        InputError: `cu_seqlens` is not of N rows of at most L tokens.
    """
    bounds = row_bounds(cu_seqlens, int(cu_seqlens[-1]))
    lengths = [end - start for start, end in pairwise(bounds)]
    if len(lengths) != x_NL.shape[0] or max(lengths) > x_NL.shape[1]:
        raise InputError(
            f"cu_seqlens cuts {len(lengths)} rows of up to {max(lengths)} tokens, the rows to pack are "
            f"{x_NL.shape[0]} of {x_NL.shape[1]}"
        )
    return torch.cat([row_L[:length] for row_L, length in zip(x_NL, lengths, strict=True)]).unsqueeze(0)
