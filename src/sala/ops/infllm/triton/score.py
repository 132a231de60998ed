"""How much each block weighs for each query, in Triton: two passes over compressed keys, summed over a group's heads.

A program takes the rows of a tile: some tokens by the heads of one group. The first pass makes the logarithm of each
row's normaliser, the second the rows' weights of a window, their sum over the heads, and the best window of each block;
a weight of a single head is never written. Everything here is in powers of two.
"""

import triton
import triton.language as tl

# of products of float32, on tensor cores: three of tf32 for one, which keeps float32's precision but for a bit or two
PRECISION = tl.constexpr("tf32x3")
# the bits of the largest float32: what is forced must stand above it
LARGEST = tl.constexpr(0x7F7FFFFF)
# a head's weight goes up to 2^120, so that a sum over a group's heads is finite
LARGEST_LOG = tl.constexpr(120.0)


@triton.jit
def num_windows(position, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Return how many windows are complete at a position; none at padding, whose position is negative."""
    return tl.where(position + 1 >= SIZE, (position + 1 - SIZE) // STRIDE + 1, 0)


@triton.jit
def rows_of_tile(tile, T, group, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Return for each row of a tile its token and its head in the group, and whether there is such a row."""
    row_M = tl.arange(0, TOKENS * HEADS)
    token_M = tile * TOKENS + row_M // HEADS
    head_M = row_M % HEADS
    return token_M, head_M, (token_M < T) & (head_M < group)


@triton.jit
def _log_sum(
    q_MK,
    keys,
    b,
    g,
    visible_M,
    begin,
    end,
    K: tl.constexpr,
    scale_log2,
    WINDOWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return each row's log2 of the sum of 2^score over its visible windows of begin..end-1, -inf where there is none."""
    column_K = tl.arange(0, WIDTH)
    peak_M = tl.full([ROWS], -float("inf"), tl.float32)
    sum_M = tl.full([ROWS], 0.0, tl.float32)
    for first in range(begin, end, WINDOWS):
        window_N = first + tl.arange(0, WINDOWS)
        at_KN = keys.at + b * keys.row + g * keys.head
        at_KN += window_N.to(tl.int64)[None, :] * keys.place + column_K[:, None]
        k_KN = tl.load(at_KN, mask=(window_N < end)[None, :] & (column_K < K)[:, None], other=0.0)
        score_MN = tl.dot(q_MK, k_KN, input_precision=PRECISION) * scale_log2
        score_MN = tl.where(window_N[None, :] < visible_M[:, None], score_MN, -float("inf"))
        higher_M = tl.maximum(peak_M, tl.max(score_MN, 1))
        # of nothing seen yet -inf minus -inf would be made
        shift_M = tl.where(higher_M == -float("inf"), 0.0, higher_M)
        sum_M = sum_M * tl.exp2(peak_M - shift_M) + tl.sum(tl.exp2(score_MN - shift_M[:, None]), 1)
        peak_M = higher_M
    return tl.where(sum_M > 0, peak_M + tl.log2(tl.where(sum_M > 0, sum_M, 1.0)), -float("inf"))


@triton.jit(do_not_specialize=["T", "first_token", "split_windows"])
def normalizers(
    q,
    fine,
    coarse,
    positions,
    first_sparse,
    out,
    T,
    first_token,
    split_windows,
    scale_log2,
    group,
    G,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    COARSE_SIZE: tl.constexpr,
    COARSE_STRIDE: tl.constexpr,
    EXACT: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WINDOWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write each row's logarithm of its normaliser over a split of the windows, (splits, B * G, tiles, rows)."""
    tile, bg, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    row_M = tl.arange(0, TOKENS * HEADS)
    column_K = tl.arange(0, WIDTH)
    token_M, head_M, is_row_M = rows_of_tile(first_token // TOKENS + tile, T, group, TOKENS, HEADS)
    position_M = tl.load(positions + b * T + token_M, mask=is_row_M, other=-1)
    # who reads everything needs no scores
    position_M = tl.where(position_M >= tl.load(first_sparse + b), position_M, -1)
    at_MK = q.at + b * q.row + token_M.to(tl.int64)[:, None] * q.place
    at_MK += (g * group + head_M)[:, None] * q.head + column_K[None, :]
    q_MK = tl.load(at_MK, mask=is_row_M[:, None] & (column_K < K)[None, :], other=0.0)
    fine_M = num_windows(position_M, SIZE, STRIDE)
    if EXACT:
        coarse_M = tl.full([TOKENS * HEADS], 0, tl.int32)
        log_M = tl.full([TOKENS * HEADS], -float("inf"), tl.float32)
    else:
        coarse_M = num_windows(position_M, COARSE_SIZE, COARSE_STRIDE)
        begin = split * split_windows
        end = tl.minimum(begin + split_windows, tl.max(coarse_M, 0))
        log_M = _log_sum(q_MK, coarse, b, g, coarse_M, begin, end, K, scale_log2, WINDOWS, WIDTH, TOKENS * HEADS)
    # without a coarse window the exact normaliser
    fine_M = tl.where(coarse_M > 0, 0, fine_M)
    begin = split * split_windows
    end = tl.minimum(begin + split_windows, tl.max(fine_M, 0))
    exact_M = _log_sum(q_MK, fine, b, g, fine_M, begin, end, K, scale_log2, WINDOWS, WIDTH, TOKENS * HEADS)
    log_M = tl.where(coarse_M > 0, log_M, exact_M)
    at = ((split * tl.num_programs(1) + bg).to(tl.int64) * tl.num_programs(0) + tile) * (TOKENS * HEADS)
    tl.store(out + at + row_M, log_M)


@triton.jit
def _score_blocks(
    q_KM,
    keys,
    b,
    g,
    panel,
    panel_size,
    log_M,
    visible_M,
    token_C,
    is_token_C,
    begin,
    end,
    num_blocks,
    K: tl.constexpr,
    scale_log2,
    STEP: tl.constexpr,
    REACH: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the scores of blocks begin..end-1 as bits; MASKED where a row may not see some of their windows."""
    column_K = tl.arange(0, WIDTH)
    last_window = tl.max(visible_M, 0)
    best_NC = tl.full([BLOCKS, TOKENS], 0, tl.int32)
    # windows by their place in a block, so that the best of a block's is that of whole tensors; in one loop, so that the
    # loads of one product run beside the products before it
    for i in range((end - begin + BLOCKS - 1) // BLOCKS * STEP):
        offset = i % STEP
        block_N = begin + i // STEP * BLOCKS + tl.arange(0, BLOCKS)
        window_N = block_N * STEP + offset
        at_NK = keys.at + b * keys.row + g * keys.head
        at_NK += window_N.to(tl.int64)[:, None] * keys.place + column_K[None, :]
        is_key_NK = (column_K < K)[None, :]
        if MASKED:
            is_key_NK &= (window_N < last_window)[:, None]
        k_NK = tl.load(at_NK, mask=is_key_NK, other=0.0)
        weight_NM = tl.dot(k_NK, q_KM, input_precision=PRECISION) * scale_log2 - log_M[None, :]
        weight_NM = tl.exp2(tl.minimum(weight_NM, LARGEST_LOG))
        if MASKED:
            weight_NM = tl.where(window_N[:, None] < visible_M[None, :], weight_NM, 0.0)
        share_NC = tl.sum(tl.reshape(weight_NM, [BLOCKS, TOKENS, HEADS]), 2)
        # a float32 that is not negative sorts as its bits do; what is no number is the largest
        bits_NC = tl.minimum(share_NC.to(tl.int32, bitcast=True), LARGEST)
        best_NC = tl.maximum(tl.where(offset == 0, 0, best_NC), bits_NC)
        at_NC = panel + token_C.to(tl.int64)[None, :] * num_blocks + block_N[:, None]
        is_score_NC = is_token_C[None, :] & (block_N < end)[:, None]
        if offset == STEP - 1:
            tl.store(at_NC, best_NC, mask=is_score_NC)
        # windows that start here and reach into later blocks, each to a panel of its own
        for reach in tl.static_range(1, REACH + 1):
            if (offset + reach) % STEP == 0:
                ahead = (offset + reach) // STEP
                is_block_NC = is_score_NC & (block_N + ahead < num_blocks)[:, None]
                tl.store(at_NC + reach * panel_size + ahead, bits_NC, mask=is_block_NC)


@triton.jit(do_not_specialize=["T", "first_token", "tokens", "num_blocks", "split_blocks", "num_splits"])
def score_blocks(
    q,
    fine,
    positions,
    first_sparse,
    logs,
    panels,
    T,
    first_token,
    tokens,
    num_blocks,
    split_blocks,
    num_splits,
    scale_log2,
    group,
    G,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    REACH: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the bits of the blocks' scores, (1 + REACH, B * G, tokens, num_blocks).

    Panel 0 holds the best of the windows that start in a block, panel r the window r before the block's first, where
    that reaches into the block.
    """
    tile, bg, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    ROWS: tl.constexpr = TOKENS * HEADS
    row_M = tl.arange(0, ROWS)
    column_K = tl.arange(0, WIDTH)
    token_M, head_M, is_row_M = rows_of_tile(first_token // TOKENS + tile, T, group, TOKENS, HEADS)
    position_M = tl.load(positions + b * T + token_M, mask=is_row_M, other=-1)
    position_M = tl.where(position_M >= tl.load(first_sparse + b), position_M, -1)
    # padded heads have no position, and would hide the others' windows from the loop without masks
    visible_M = num_windows(position_M, SIZE, STRIDE)
    own_block = tl.max(position_M, 0) // BLOCK
    begin = split * split_blocks
    end = tl.minimum(begin + split_blocks, tl.where(tl.max(position_M, 0) >= 0, own_block + 1, 0))
    if begin < end:
        at_KM = q.at + b * q.row + token_M.to(tl.int64)[None, :] * q.place
        at_KM += (g * group + head_M)[None, :] * q.head + column_K[:, None]
        q_KM = tl.load(at_KM, mask=is_row_M[None, :] & (column_K < K)[:, None], other=0.0)
        log_M = tl.full([ROWS], -float("inf"), tl.float32)
        # some parts at a time, for a load waits as long as many
        for first in range(0, num_splits, PARTS):
            part_P = first + tl.arange(0, PARTS)
            at_P = ((part_P * tl.num_programs(1) + bg).to(tl.int64) * tl.num_programs(0) + tile) * ROWS
            is_part_P1 = (part_P < num_splits)[:, None]
            part_PM = tl.load(logs + at_P[:, None] + row_M[None, :], mask=is_part_P1, other=-float("inf"))
            high_M = tl.maximum(log_M, tl.max(part_PM, 0))
            shift_M = tl.where(high_M == -float("inf"), 0.0, high_M)
            sum_M = tl.exp2(log_M - shift_M) + tl.sum(tl.exp2(part_PM - shift_M[None, :]), 0)
            log_M = tl.where(sum_M > 0, shift_M + tl.log2(tl.where(sum_M > 0, sum_M, 1.0)), -float("inf"))
        # a weight of zero
        log_M = tl.where(visible_M > 0, log_M, float("inf"))
        STEP: tl.constexpr = BLOCK // STRIDE
        # blocks all of whose windows every row of a token that chooses sees
        seen = tl.min(tl.where(head_M < group, visible_M, 2147483647), 0) // STEP
        free = begin + tl.maximum(tl.minimum(seen, end) - begin, 0) // BLOCKS * BLOCKS
        token_C = tile * TOKENS + tl.arange(0, TOKENS)
        is_token_C = token_C < tokens
        panel_size = tl.num_programs(1).to(tl.int64) * tokens * num_blocks
        panel = panels + bg.to(tl.int64) * tokens * num_blocks
        _score_blocks(
            q_KM, fine, b, g, panel, panel_size, log_M, visible_M, token_C, is_token_C,
            begin, free, num_blocks, K, scale_log2, STEP, REACH, TOKENS, HEADS, BLOCKS, WIDTH, False,
        )  # fmt: skip
        _score_blocks(
            q_KM, fine, b, g, panel, panel_size, log_M, visible_M, token_C, is_token_C,
            free, end, num_blocks, K, scale_log2, STEP, REACH, TOKENS, HEADS, BLOCKS, WIDTH, True,
        )  # fmt: skip
