"""The choice of blocks in Triton: scores of some queries at a time, and a search for their best on the scores' bits."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sala.errors import BackendError
from sala.ops import gpu
from sala.ops.infllm.geometry import Numbers, SparseGeometry
from sala.ops.infllm.triton.score import normalizers, score_blocks

# the most rows of a tile of scores, tokens by the heads of a group, and the most tokens of it
SCORE_ROWS = 128
SCORE_TOKENS = 32
# blocks a program scores at a time, and windows it passes over
SCORE_BLOCKS = 64
SCORE_WINDOWS = 64
# what block scores of the queries chosen for at a time may take; they are made and read once
PANEL_BYTES = 2**28
# up to so many queries a row the work of each is cut into pieces, for there are too few of them to fill a device
FEW_QUERIES = 16
FEW_SPLIT_BLOCKS = 64
FEW_SPLIT_WINDOWS = 256
# the most tokens of a tile that reads its blocks together: the bits below a block in a list say whose it is
LIST_BITS = 8
# blocks that a program looks at together, times its queries
CHOICE_ELEMENTS = 4096
# of few queries, each of whose programs has a multiprocessor for itself: a million tokens' blocks of 64 at once
FEW_CHOICE_ELEMENTS = 16384


def list_tile(T: int, group: int, dtype: torch.dtype, *widths: int) -> tuple[int, int]:
    """Return `tile_shape` of the tiles that read their blocks together."""
    return tile_shape(group, T, gpu.tile_rows(dtype.itemsize, *widths), LIST_BITS)


def tile_keys(most: int, dtype: torch.dtype, *widths: int) -> int:
    """Return how many keys are loaded at a time: `most`, or as many as a tile holds."""
    return min(most, gpu.tile_rows(dtype.itemsize, *widths))


def padded(width: int) -> int:
    """Return a width as products take it: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(width))


def stages(most: int, dtype: torch.dtype, *widths: int) -> int:
    """Return how many blocks of keys are on their way at a time: `most`, or one where they are large."""
    return most if max(widths) * dtype.itemsize <= 256 else 1


def tile_shape(group: int, T: int, rows: int, most_tokens: int) -> tuple[int, int]:
    """Return the tokens of a tile of at most `rows` rows, and the rows each takes: its heads, padded to a power of two.

    Raises:
        BackendError: more heads in a group than a tile has rows.
    """
    heads = triton.next_power_of_2(group)
    if heads > rows:
        raise BackendError(f"infllm: backend 'triton' takes groups of at most {rows} heads, not of {group}")
    tokens = min(most_tokens, rows // heads, triton.next_power_of_2(T))
    # a matrix product has at least 16 rows
    return tokens, max(heads, 16 // tokens)


def select(
    q_BTHK: Tensor, k1_BNGK: Tensor, k2_BNGK: Tensor, positions_BT: Tensor, geometry: SparseGeometry, scale: float
) -> Tensor:
    """Return (B, T, G, num_selected) int32 block indices, ascending, -1 at the end; see `select_blocks`."""
    return _operator(q_BTHK, k1_BNGK, k2_BNGK, positions_BT, geometry.numbers, scale)


def _table(
    q_BTHK: Tensor, k1_BNGK: Tensor, k2_BNGK: Tensor, positions_BT: Tensor, geometry: list[int], scale: float
) -> Tensor:
    B, T = q_BTHK.shape[:2]
    return q_BTHK.new_empty((B, T, k1_BNGK.shape[2], Numbers(*geometry).num_selected), dtype=torch.int32)


@gpu.operator(
    "infllm_triton_select(Tensor q, Tensor k1, Tensor k2, Tensor positions, int[] geometry, float scale) -> Tensor",
    _table,
)
def _operator(
    q_BTHK: Tensor, k1_BNGK: Tensor, k2_BNGK: Tensor, positions_BT: Tensor, geometry: list[int], scale: float
) -> Tensor:
    table_BTGN = _table(q_BTHK, k1_BNGK, k2_BNGK, positions_BT, geometry, scale)
    B, T, G, N = table_BTGN.shape
    if not table_BTGN.numel():
        return table_BTGN
    # without a call's keys the blocks are counted by the windows: no query sees a later window, nor needs its block
    # unless it must be read anyway
    num_blocks = max(0, int(positions_BT.max())) // Numbers(*geometry).block_size + 1
    positions_BT = positions_BT.to(torch.int32).contiguous()
    first_sparse_B = positions_BT.new_full((B,), N * Numbers(*geometry).block_size)
    size = chunk_tokens(B, T, G, num_blocks, geometry)
    for first in range(0, T, size):
        choose(
            q_BTHK, k1_BNGK, k2_BNGK, positions_BT, first_sparse_B, geometry, scale, num_blocks, first,
            min(size, T - first), table_BTGN=table_BTGN,
        )  # fmt: skip
    return table_BTGN


def chunk_tokens(B: int, T: int, G: int, num_blocks: int, geometry: list[int]) -> int:
    """Return for how many tokens of each row blocks are chosen at a time: whole tiles, whose scores fit PANEL_BYTES."""
    size, stride, *_ = geometry
    token_bytes = 4 * B * G * num_blocks * (1 + (size - 1) // stride)
    return max(SCORE_ROWS, min(T, PANEL_BYTES // token_bytes) // SCORE_ROWS * SCORE_ROWS)


def choose(
    q_BTHK: Tensor,
    k1_BNGK: Tensor,
    k2_BNGK: Tensor,
    positions_BT: Tensor,
    first_sparse_B: Tensor,
    geometry: list[int],
    scale: float,
    num_blocks: int,
    first: int,
    tokens: int,
    *,
    table_BTGN: Tensor | None = None,
    lists_BGNL: Tensor | None = None,
    counts_BGN2: Tensor | None = None,
    list_tokens: int = 1,
    first_tile: int = 0,
) -> None:
    """Choose the blocks of `tokens` tokens of each row from token `first` on, into a table, lists, or both.

    Args:
        positions_BT: (B, T) int32, contiguous; negative is padding, which reads nothing.
        first_sparse_B: (B,) int32: queries at lower positions read every block up to their own.
        num_blocks: blocks up to the last position's, or more.
        table_BTGN: (B, T, G, W) int32: each query's blocks, ascending, -1 at the end.
        lists_BGNL: (B, G, tiles, L) int32: the blocks that any of the `list_tokens` tokens of a tile chose, ascending,
            each above LIST_BITS bits that tell which of the tokens did.
        counts_BGN2: (B, G, tiles, 2) int32: how many entries of a list end before the first position of the tile, and
            how many there are.
        list_tokens: tokens of a tile that has a list.
        first_tile: the place of the first list among the tiles.
    """
    B, T, H, K = q_BTHK.shape
    G = k1_BNGK.shape[2]
    group = H // G
    size, stride, coarse_size, coarse_stride, block, init, local, count, exact = geometry
    step, reach = block // stride, (size - 1) // stride
    dtype = torch.promote_types(torch.promote_types(q_BTHK.dtype, k1_BNGK.dtype), k2_BNGK.dtype)
    score_tokens, heads = tile_shape(group, T, min(SCORE_ROWS, 2 * gpu.tile_rows(dtype.itemsize, K)), SCORE_TOKENS)
    tiles = triton.cdiv(tokens, score_tokens)
    few = T <= FEW_QUERIES
    # of the fine tier those, at least, that a query without a coarse window sees
    windows = max(min((k1_BNGK if exact else k2_BNGK).shape[1], num_blocks * step), coarse_size // stride)
    split_windows = FEW_SPLIT_WINDOWS if few else windows
    split_blocks = FEW_SPLIT_BLOCKS if few else num_blocks
    splits = triton.cdiv(windows, split_windows)
    device = q_BTHK.device
    logs = torch.empty(splits, B * G, tiles * score_tokens * heads, dtype=torch.float32, device=device)
    panels = torch.empty(1 + reach, B * G, tokens, num_blocks, dtype=torch.int32, device=device)
    scale_log2 = scale * math.log2(math.e)
    # keys may be kept in another dtype than queries: the wider holds both
    q, k1, k2 = (gpu.strided(x.to(dtype)) for x in (q_BTHK, k1_BNGK, k2_BNGK))
    shared = {
        "TOKENS": score_tokens,
        "HEADS": heads,
        "WIDTH": padded(K),
        "num_warps": 8 if score_tokens * heads > 64 else 4,
        "num_stages": stages(3, dtype, K),
    }
    normalizers[tiles, B * G, splits](
        q, k1, k2, positions_BT, first_sparse_B, logs,
        T, first, split_windows, scale_log2, group, G, K,
        size, stride, coarse_size, coarse_stride, bool(exact), WINDOWS=tile_keys(SCORE_WINDOWS, dtype, K), **shared,
    )  # fmt: skip
    score_blocks[tiles, B * G, triton.cdiv(num_blocks, split_blocks)](
        q, k1, positions_BT, first_sparse_B, logs, panels,
        T, first, tokens, num_blocks, split_blocks, splits, scale_log2, group, G, K,
        size, stride, block, reach, BLOCKS=tile_keys(SCORE_BLOCKS, dtype, K), PARTS=16 if few else 1, **shared,
    )  # fmt: skip
    table_width = 0 if table_BTGN is None else table_BTGN.shape[3]
    list_tiles, list_width = (0, 0) if lists_BGNL is None else lists_BGNL.shape[2:]
    together = min(LIST_BITS, triton.next_power_of_2(T)) if lists_BGNL is None else list_tokens
    elements = FEW_CHOICE_ELEMENTS if few else CHOICE_ELEMENTS
    blocks = max(16, min(triton.next_power_of_2(num_blocks), elements // together))
    _choose[triton.cdiv(tokens, together), B * G](
        panels, positions_BT, first_sparse_B, table_BTGN, lists_BGNL, counts_BGN2,
        T, first, tokens, num_blocks, first_tile, list_tiles, table_width, list_width, G,
        block, step, reach, init, local, count, together, blocks, LIST_BITS, num_blocks <= blocks,
        num_warps=max(4, blocks * together // 512) if few else 4,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["T", "first_token", "tokens", "num_blocks", "first_tile", "tiles", "table_width", "list_width"]
)
def _choose(
    panels,
    positions,
    first_sparse,
    table,
    lists,
    counts,
    T,
    first_token,
    tokens,
    num_blocks,
    first_tile,
    tiles,
    table_width,
    list_width,
    G,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    REACH: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    COUNT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    tile, bg = tl.program_id(0), tl.program_id(1)
    b, g = (bg // G).to(tl.int64), bg % G
    token_C = tile * TOKENS + tl.arange(0, TOKENS)
    is_token_C = token_C < tokens
    position_C = tl.load(positions + b * T + first_token + token_C, mask=is_token_C, other=-1)
    own_C = tl.where(position_C >= 0, position_C // BLOCK, -1)
    whole_C = position_C < tl.load(first_sparse + b)
    num_here = tl.max(own_C, 0) + 1
    # where nothing is chosen nothing was scored
    num_scored = tl.where(tl.min(whole_C.to(tl.int32), 0) == 0, num_here, 0)
    panel_size = tl.num_programs(1).to(tl.int64) * tokens * num_blocks
    row_C = panels + (bg.to(tl.int64) * tokens + token_C) * num_blocks
    # a block's score is that of its best window, and what must be read stands above all numbers
    for first in range(0, num_scored, BLOCKS):
        block_N = first + tl.arange(0, BLOCKS)
        counts_CN = (block_N[None, :] <= own_C[:, None]) & (whole_C == 0)[:, None]
        at_CN = row_C[:, None] + block_N[None, :]
        bits_CN = tl.load(at_CN, mask=counts_CN, other=0)
        for reach in tl.static_range(1, REACH + 1):
            reached_CN = counts_CN & (block_N * STEP >= reach)[None, :]
            bits_CN = tl.maximum(bits_CN, tl.load(at_CN + reach * panel_size, mask=reached_CN, other=0))
        forced_CN = (block_N < INIT)[None, :] | (block_N[None, :] >= own_C[:, None] - LOCAL)
        tl.store(at_CN, tl.where(forced_CN, 0x7F800000, bits_CN), mask=counts_CN)
    tl.debug_barrier()
    # the largest threshold that COUNT blocks reach, bit by bit
    threshold_C = tl.full([TOKENS], 0, tl.int32)
    block_N = tl.arange(0, BLOCKS)
    counts_CN = (block_N[None, :] <= own_C[:, None]) & (whole_C == 0)[:, None]
    bits_CN = tl.full([TOKENS, BLOCKS], -1, tl.int32)
    if AT_ONCE:
        # read once, and not 31 times
        bits_CN = tl.load(row_C[:, None] + block_N[None, :], mask=counts_CN, other=-1)
    for step in range(tl.where(num_scored > 0, 31, 0)):
        trial_C = threshold_C | (1 << (30 - step))
        if AT_ONCE:
            reaching_C = tl.sum((bits_CN >= trial_C[:, None]).to(tl.int32), 1)
        else:
            reaching_C = tl.full([TOKENS], 0, tl.int32)
            for first in range(0, num_scored, BLOCKS):
                block_N = first + tl.arange(0, BLOCKS)
                counts_CN = (block_N[None, :] <= own_C[:, None]) & (whole_C == 0)[:, None]
                bits_CN = tl.load(row_C[:, None] + block_N[None, :], mask=counts_CN, other=-1)
                reaching_C += tl.sum((bits_CN >= trial_C[:, None]).to(tl.int32), 1)
        threshold_C = tl.where(reaching_C >= COUNT, trial_C, threshold_C)
    above_C = tl.full([TOKENS], 0, tl.int32)
    for first in range(0, num_scored, BLOCKS):
        block_N = first + tl.arange(0, BLOCKS)
        counts_CN = (block_N[None, :] <= own_C[:, None]) & (whole_C == 0)[:, None]
        bits_CN = tl.load(row_C[:, None] + block_N[None, :], mask=counts_CN, other=-1)
        above_C += tl.sum((bits_CN > threshold_C[:, None]).to(tl.int32), 1)
    # of those that only just reach it the lower index first
    equal_C = tl.full([TOKENS], 0, tl.int32)
    taken_C = tl.full([TOKENS], 0, tl.int32)
    listed = 0
    before = 0
    first_position = tl.min(tl.where(position_C >= 0, position_C, 2147483647), 0)
    table_C = (b * T + first_token + token_C) * G + g
    for first in range(0, num_here, BLOCKS):
        block_N = first + tl.arange(0, BLOCKS)
        exists_CN = block_N[None, :] <= own_C[:, None]
        bits_CN = tl.load(row_C[:, None] + block_N[None, :], mask=exists_CN & (whole_C == 0)[:, None], other=-1)
        equal_CN = (bits_CN == threshold_C[:, None]).to(tl.int32)
        rank_CN = tl.cumsum(equal_CN, 1) + equal_C[:, None]
        chosen_CN = (bits_CN > threshold_C[:, None]) | ((equal_CN > 0) & (rank_CN <= (COUNT - above_C)[:, None]))
        chosen_CN = tl.where(whole_C[:, None], exists_CN, chosen_CN & exists_CN)
        equal_C += tl.sum(equal_CN, 1)
        if table is not None:
            place_CN = tl.cumsum(chosen_CN.to(tl.int32), 1) - 1 + taken_C[:, None]
            to_CN = table + table_C[:, None] * table_width + place_CN
            tl.store(to_CN, tl.broadcast_to(block_N[None, :], [TOKENS, BLOCKS]), mask=chosen_CN)
            taken_C += tl.sum(chosen_CN.to(tl.int32), 1)
        if lists is not None:
            members_N = tl.sum(chosen_CN.to(tl.int32) << tl.arange(0, TOKENS)[:, None], 0)
            any_N = (members_N > 0).to(tl.int32)
            to_N = lists + (bg.to(tl.int64) * tiles + first_tile + tile) * list_width
            tl.store(to_N + listed + tl.cumsum(any_N, 0) - 1, (block_N << BITS) | members_N, mask=any_N > 0)
            listed += tl.sum(any_N, 0)
            before += tl.sum(tl.where((block_N + 1) * BLOCK - 1 <= first_position, any_N, 0), 0)
    if table is not None:
        for first in range(0, table_width, BLOCKS):
            place_N = first + tl.arange(0, BLOCKS)
            rest_CN = (place_N[None, :] >= taken_C[:, None]) & (place_N < table_width)[None, :] & is_token_C[:, None]
            none_CN = tl.full([TOKENS, BLOCKS], -1, tl.int32)
            tl.store(table + table_C[:, None] * table_width + place_N[None, :], none_CN, mask=rest_CN)
    if lists is not None:
        at = (bg.to(tl.int64) * tiles + first_tile + tile) * 2
        tl.store(counts + at, before)
        tl.store(counts + at + 1, listed)
