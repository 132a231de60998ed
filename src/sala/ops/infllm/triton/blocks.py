"""A block of keys of a list, in Triton: where it lies, its numbers, and a tile's scores for it."""

import triton
import triton.language as tl

from sala.ops.infllm.triton.score import PRECISION


@triton.jit
def place_of_block(block, b, pages, BLOCK: tl.constexpr, PAGE: tl.constexpr):
    """Return in which row of a cache a block of row b lies, and at which place there: with pages, these are its rows."""
    if pages is None:
        return b, block * BLOCK
    else:
        return tl.load(pages + block * BLOCK // PAGE).to(tl.int64), block * BLOCK % PAGE


@triton.jit
def load_block(x, row, g, place_N, is_key_N, width, WIDTH: tl.constexpr):
    """Return the keys or values at some places of a row, (N, WIDTH); zero where there is none."""
    column_K = tl.arange(0, WIDTH)
    at_N = x.at + row * x.row + g * x.head + place_N.to(tl.int64) * x.place
    is_number_NK = is_key_N[:, None] & (column_K < width)[None, :]
    return tl.load(at_N[:, None] + column_K[None, :], mask=is_number_NK, other=0.0)


@triton.jit
def score_entry(
    entry,
    part,
    b,
    g,
    q_MK,
    k,
    pages,
    place_M,
    position_M,
    K: tl.constexpr,
    scale_log2,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Return the scores of a part of an entry's keys, in powers of two, -inf where a row may not see a key, its keys, and where they lie.

    Args:
        entry: a block above BITS bits that tell which of the tile's tokens chose it.
        part: which KEYS of its BLOCK tokens.
        b, g: the row of the batch, and the group.
        place_M: each row's token, counted within the tile.
        EDGE: whether a row may not see some of the keys.

    Returns:
        score_MN, k_NK, chose_M (whether a row's token chose the block), and row, place_N, is_key_N as `load_block`
        takes them.
    """
    key_N = part * KEYS + tl.arange(0, KEYS)
    block = entry >> BITS
    row, first = place_of_block(block, b, pages, BLOCK, PAGE)
    token_N = block * BLOCK + key_N
    is_key_N = key_N < BLOCK
    if EDGE:
        # what lies behind the last key need not be a number, and a weight of zero would not hide it
        is_key_N &= token_N <= tl.max(position_M, 0)
    k_NK = load_block(k, row, g, first + key_N, is_key_N, K, WIDTH)
    score_MN = tl.dot(q_MK, tl.trans(k_NK), input_precision=PRECISION) * scale_log2
    if EDGE:
        score_MN = tl.where(is_key_N[None, :] & (token_N[None, :] <= position_M[:, None]), score_MN, -float("inf"))
    elif BLOCK % KEYS != 0:
        score_MN = tl.where(is_key_N[None, :], score_MN, -float("inf"))
    chose_M = ((entry >> place_M) & 1) != 0
    return score_MN, k_NK, chose_M, row, first + key_N, is_key_N
