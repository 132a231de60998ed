"""Attention over chosen blocks in Triton: a tile of tokens reads every block that any of them chose, once.

The rows of a tile are its tokens by the heads of one group. Neighbours share most of what they read: the first blocks,
the window, and where queries resemble each other the rest too; a block of keys is loaded once for all of them, and rows
of tokens that did not choose it have no weight in it. The running softmax is FlashAttention's (arXiv 2205.14135,
algorithm 1). Few queries, as in decoding, read pieces of their lists side by side, which are then combined.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sala.ops import gpu
from sala.ops.dense import dense_attention
from sala.ops.infllm.geometry import Numbers, SparseGeometry
from sala.ops.infllm.triton.backward import gradients
from sala.ops.infllm.triton.blocks import load_block, score_entry
from sala.ops.infllm.triton.score import PRECISION, rows_of_tile
from sala.ops.infllm.triton.select import (
    FEW_QUERIES,
    LIST_BITS,
    choose,
    chunk_tokens,
    list_tile,
    padded,
    stages,
    tile_keys,
)
from sala.ops.pages import windows_in_order

# entries of a list that a program reads for each token of its tile, where there are few queries
FEW_ENTRIES = 2
# rows of a program that combines, and how many of their pieces it takes at a time
COMBINED_ROWS = 4
COMBINED_PIECES = 16


def attend(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    k1_BNGK: Tensor,
    k2_BNGK: Tensor,
    positions_BT: Tensor | None,
    geometry: SparseGeometry,
    scale: float,
    start: int | None,
    page_table_BP: Tensor | None = None,
) -> Tensor:
    """Return (B, T, H, V) in v's dtype, differentiable through q, k and v where they are no pages; see `infllm_attention`."""
    block_size = geometry.block_size
    if page_table_BP is not None:
        # a twentieth of the keys, and the kernels read all of them in order
        k1_BNGK = windows_in_order(k1_BNGK, page_table_BP, geometry.kernel_size, geometry.kernel_stride)
        k2_BNGK = windows_in_order(k2_BNGK, page_table_BP, geometry.coarse_size, geometry.coarse_stride)
        page_table_BP = page_table_BP.contiguous()
    if start == 0 and page_table_BP is None:
        # the beginning reads everything before it: torch's own causal attention
        num_dense = min(q_BTHK.shape[1], geometry.first_sparse_position(q_BTHK.shape[1] - 1))
        if num_dense:
            q_dense, q_sparse = q_BTHK[:, :num_dense], q_BTHK[:, num_dense:]
            dense = dense_attention(q_dense, k_BSGK, v_BSGV, None, scale=scale, start=0, backend="eager")
            sparse = attend(q_sparse, k_BSGK, v_BSGV, k1_BNGK, k2_BNGK, None, geometry, scale, num_dense)
            return torch.cat([dense, sparse], 1)
    B, T = q_BTHK.shape[:2]
    if start is not None:
        first_sparse = geometry.first_sparse_position(start + T - 1)
        positions_BT = torch.arange(start, start + T, dtype=torch.int32, device=q_BTHK.device).expand(B, T)
        first_sparse_B = torch.full((B,), first_sparse, dtype=torch.int32, device=q_BTHK.device)
    else:
        assert positions_BT is not None
        first_sparse = max(geometry.dense_len - 1, geometry.num_selected * block_size)
        first_sparse_B = _first_sparse(positions_BT, geometry)
    # blocks that a query which chooses none reads
    whole_blocks = triton.cdiv(first_sparse, block_size) if start is None or start < first_sparse else 0
    out_BTHV, *_ = _operator(
        q_BTHK,
        k_BSGK,
        v_BSGV,
        k1_BNGK,
        k2_BNGK,
        positions_BT.to(torch.int32).contiguous(),
        first_sparse_B,
        page_table_BP,
        geometry.numbers,
        whole_blocks,
        scale,
        torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTHK, k_BSGK, v_BSGV)),
    )
    return out_BTHV


def _first_sparse(positions_BT: Tensor, geometry: SparseGeometry) -> Tensor:
    """Return `geometry.first_sparse_position` of each row, (B,) int32, without looking at the positions here."""
    all_fit = geometry.num_selected * geometry.block_size
    if geometry.dense_rule == "position" or not positions_BT.shape[1]:
        return positions_BT.new_full((len(positions_BT),), max(geometry.dense_len - 1, all_fit), dtype=torch.int32)
    length_B = positions_BT.amax(1).int() + 1
    return torch.where(length_B >= geometry.dense_len, all_fit, length_B.clamp(min=all_fit)).int()


def _shapes(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    k1_BNGK: Tensor,
    k2_BNGK: Tensor,
    positions_BT: Tensor,
    first_sparse_B: Tensor,
    page_table_BP: Tensor | None,
    geometry: list[int],
    whole_blocks: int,
    scale: float,
    recorded: bool,
) -> tuple[Tensor, ...]:
    B, T, H, K = q_BTHK.shape
    G, V = v_BSGV.shape[2:]
    out_BTHV = v_BSGV.new_empty(B, T, H, V)
    if not recorded:
        return out_BTHV, *(q_BTHK.new_empty(0, dtype=dtype) for dtype in _KEPT)
    tokens, _ = list_tile(T, H // G, v_BSGV.dtype, K, V)
    tiles = triton.cdiv(T, tokens)
    num_blocks = triton.cdiv(_capacity(k_BSGK, page_table_BP), Numbers(*geometry).block_size)
    width = _list_width(tokens, num_blocks, geometry, whole_blocks)
    sizes = (
        (B, T, H),
        (B, G, tiles, width),
        (B, G, tiles, 2),
        (B, T, G, max(Numbers(*geometry).num_selected, min(num_blocks, whole_blocks))),
    )
    return out_BTHV, *(q_BTHK.new_empty(size, dtype=dtype) for size, dtype in zip(sizes, _KEPT, strict=True))


# the logarithm of each row's softmax sum, lists, their counts, and the table
_KEPT = (torch.float32, torch.int32, torch.int32, torch.int32)


def _capacity(k_BSGK: Tensor, page_table_BP: Tensor | None) -> int:
    """Return how many keys a row has, or has room for."""
    return k_BSGK.shape[1] * (1 if page_table_BP is None else page_table_BP.shape[1])


def _list_width(tokens: int, num_blocks: int, geometry: list[int], whole_blocks: int) -> int:
    return min(num_blocks, tokens * Numbers(*geometry).num_selected + whole_blocks)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, _, positions, _, page_table, geometry, _, scale, _ = inputs
    assert page_table is None, "keys in pages have no gradient here"
    ctx.save_for_backward(q, k, v, positions, *output)
    ctx.block_size, ctx.scale = Numbers(*geometry).block_size, scale
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_BTHV: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_BTHV is None:
        return (None,) * 12
    grads = gradients(grad_BTHV, *ctx.saved_tensors, ctx.block_size, ctx.scale)
    return *grads, *(None,) * 9


@gpu.operator(
    "infllm_triton_attend(Tensor q, Tensor k, Tensor v, Tensor k1, Tensor k2, Tensor positions, Tensor first_sparse, "
    "Tensor? page_table, int[] geometry, int whole_blocks, float scale, bool recorded) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _shapes,
    _keep,
    _backward,
)
def _operator(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    k1_BNGK: Tensor,
    k2_BNGK: Tensor,
    positions_BT: Tensor,
    first_sparse_B: Tensor,
    page_table_BP: Tensor | None,
    geometry: list[int],
    whole_blocks: int,
    scale: float,
    recorded: bool,
) -> tuple[Tensor, ...]:
    out_BTHV, log_BTH, lists, counts, table = kept = _shapes(
        *(q_BTHK, k_BSGK, v_BSGV, k1_BNGK, k2_BNGK, positions_BT, first_sparse_B, page_table_BP),
        *(geometry, whole_blocks, scale, recorded),
    )
    if not out_BTHV.numel():
        return kept
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    tokens, heads = list_tile(T, H // G, v_BSGV.dtype, K, v_BSGV.shape[3])
    num_blocks = triton.cdiv(_capacity(k_BSGK, page_table_BP), Numbers(*geometry).block_size)
    size = chunk_tokens(B, T, G, num_blocks, geometry)
    if not recorded:
        # used again for every chunk
        tiles = triton.cdiv(min(T, size), tokens)
        lists = lists.new_empty(B, G, tiles, _list_width(tokens, num_blocks, geometry, whole_blocks))
        counts = counts.new_empty(B, G, tiles, 2)
    for first in range(0, T, size):
        chunk, first_tile = min(size, T - first), first // tokens if recorded else 0
        choose(
            q_BTHK, k1_BNGK, k2_BNGK, positions_BT, first_sparse_B, geometry, scale, num_blocks, first, chunk,
            table_BTGN=table if recorded else None, lists_BGNL=lists, counts_BGN2=counts, list_tokens=tokens,
            first_tile=first_tile,
        )  # fmt: skip
        attend_lists(
            q_BTHK, k_BSGK, v_BSGV, positions_BT, page_table_BP, lists, counts, out_BTHV, log_BTH if recorded else None,
            Numbers(*geometry).block_size, scale, first, chunk, tokens, heads, first_tile,
        )  # fmt: skip
    return kept


def attend_lists(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    positions_BT: Tensor,
    page_table_BP: Tensor | None,
    lists_BGNL: Tensor,
    counts_BGN2: Tensor,
    out_BTHV: Tensor,
    log_BTH: Tensor | None,
    block_size: int,
    scale: float,
    first: int,
    chunk: int,
    tokens: int,
    heads: int,
    first_tile: int,
) -> None:
    """Write the output of `chunk` tokens of each row from token `first` on, and the logarithms of their softmax's sums.

    Args:
        lists_BGNL, counts_BGN2: of tiles of `tokens` tokens, from tile `first_tile` on; see `choose`.
        log_BTH: in powers of two, infinite where a row reads nothing; None: not wanted.
        heads: rows a token takes.
    """
    B, T, H, K = q_BTHK.shape
    G, V = v_BSGV.shape[2:]
    page_size, page_count = (0, 0) if page_table_BP is None else (k_BSGK.shape[1], page_table_BP.shape[1])
    tiles, width = triton.cdiv(chunk, tokens), lists_BGNL.shape[3]
    piece_entries = FEW_ENTRIES * tokens if T <= FEW_QUERIES else width
    pieces = triton.cdiv(width, piece_entries)
    out, log = out_BTHV, log_BTH
    if pieces > 1:
        out = out_BTHV.new_empty(pieces, B, T, H, V, dtype=torch.float32)
        log = out_BTHV.new_empty(pieces, B, T, H, dtype=torch.float32)
    widths = [padded(K), padded(V)]
    _attend[tiles, B * G, pieces](
        *map(gpu.strided, (q_BTHK, k_BSGK, v_BSGV)), positions_BT, lists_BGNL, counts_BGN2, out, log, page_table_BP,
        T, first, first_tile, lists_BGNL.shape[2], width, piece_entries, page_count,
        scale * math.log2(math.e), B, H // G, G, K, V,
        block_size, tile_keys(padded(block_size), v_BSGV.dtype, *widths), tokens, heads, *widths, LIST_BITS, page_size, pieces > 1,
        num_warps=8 if max(widths) > 128 else 4,
        num_stages=stages(2, v_BSGV.dtype, *widths),
    )  # fmt: skip
    if pieces > 1:
        _combine[triton.cdiv(B * T * H, COMBINED_ROWS),](
            out, log, out_BTHV, log_BTH, pieces, B * T * H, V, COMBINED_ROWS, COMBINED_PIECES, widths[1], num_warps=4
        )


@triton.jit
def _walk(
    b,
    g,
    q_MK,
    k,
    v,
    pages,
    entries,
    begin,
    end,
    peak_M,
    sum_M,
    out_MV,
    place_M,
    position_M,
    K: tl.constexpr,
    V: tl.constexpr,
    scale_log2,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add entries begin..end-1 of a list to the running softmax; EDGE where a row may not see some of their keys."""
    # a loop that may be left out has its sums started elsewhere, and then each product waits for the one before
    if begin < end:
        PARTS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
        for i in range(begin * PARTS, end * PARTS):
            score_MN, _, chose_M, row, place_N, is_key_N = score_entry(
                tl.load(entries + i // PARTS), i % PARTS, b, g, q_MK, k, pages, place_M, position_M, K, scale_log2,
                BLOCK, KEYS, WIDTH, BITS, PAGE, EDGE,
            )  # fmt: skip
            higher_M = tl.where(chose_M, tl.maximum(peak_M, tl.max(score_MN, 1)), peak_M)
            # a row that did not choose the block, or sees none of it, gets no weight from it
            nothing_M = higher_M == -float("inf")
            weight_MN = tl.exp2(score_MN - tl.where(chose_M & (nothing_M == 0), higher_M, float("inf"))[:, None])
            shrink_M = tl.exp2(peak_M - tl.where(nothing_M, 0.0, higher_M))
            sum_M = sum_M * shrink_M + tl.sum(weight_MN, 1)
            v_NV = load_block(v, row, g, place_N, is_key_N, V, VALUE_WIDTH)
            out_MV = tl.dot(weight_MN.to(v_NV.dtype), v_NV, out_MV * shrink_M[:, None], input_precision=PRECISION)
            peak_M = higher_M
    return peak_M, sum_M, out_MV


@triton.jit(
    do_not_specialize=["T", "first_token", "first_tile", "tiles", "list_width", "piece_entries", "page_count", "B"]
)
def _attend(
    q,
    k,
    v,
    positions,
    lists,
    counts,
    out,
    log,
    pages,
    T,
    first_token,
    first_tile,
    tiles,
    list_width,
    piece_entries,
    page_count,
    scale_log2,
    B,
    group,
    G,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    PAGE: tl.constexpr,
    PIECE: tl.constexpr,
):
    tile, bg, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    token_M, head_M, is_row_M = rows_of_tile(first_token // TOKENS + tile, T, group, TOKENS, HEADS)
    place_M = tl.arange(0, TOKENS * HEADS) // HEADS
    column_K = tl.arange(0, WIDTH)
    column_V = tl.arange(0, VALUE_WIDTH)
    position_M = tl.load(positions + b * T + token_M, mask=is_row_M, other=-1)
    at_MK = q.at + b * q.row + token_M.to(tl.int64)[:, None] * q.place
    at_MK += (g * group + head_M)[:, None] * q.head + column_K[None, :]
    q_MK = tl.load(at_MK, mask=(position_M >= 0)[:, None] & (column_K < K)[None, :], other=0.0)
    at = bg.to(tl.int64) * tiles + first_tile + tile
    begin = piece * piece_entries
    free = tl.load(counts + 2 * at)
    end = tl.minimum(tl.load(counts + 2 * at + 1), begin + piece_entries)
    free = tl.maximum(tl.minimum(free, end), begin)
    entries = lists + at * list_width
    if pages is not None:
        pages += b * page_count
    peak_M = tl.full([TOKENS * HEADS], -float("inf"), tl.float32)
    sum_M = tl.full([TOKENS * HEADS], 0.0, tl.float32)
    out_MV = tl.full([TOKENS * HEADS, VALUE_WIDTH], 0.0, tl.float32)
    peak_M, sum_M, out_MV = _walk(
        b, g, q_MK, k, v, pages, entries, begin, free, peak_M, sum_M, out_MV, place_M, position_M, K, V, scale_log2,
        BLOCK, KEYS, WIDTH, VALUE_WIDTH, BITS, PAGE, False,
    )  # fmt: skip
    peak_M, sum_M, out_MV = _walk(
        b, g, q_MK, k, v, pages, entries, free, end, peak_M, sum_M, out_MV, place_M, position_M, K, V, scale_log2,
        BLOCK, KEYS, WIDTH, VALUE_WIDTH, BITS, PAGE, True,
    )  # fmt: skip
    reads_M = sum_M > 0
    some_M = tl.where(reads_M, sum_M, 1.0)
    row_M = (b * T + token_M) * (G * group) + g * group + head_M
    if PIECE:
        row_M += piece.to(tl.int64) * B * T * G * group
    at_MV = out + row_M[:, None] * V + column_V[None, :]
    tl.store(
        at_MV, (out_MV / some_M[:, None]).to(out.dtype.element_ty), mask=is_row_M[:, None] & (column_V < V)[None, :]
    )
    if log is not None:
        # what has no keys has no weight: in a backward pass by an infinite sum, in a combination by one of zero
        none = -float("inf") if PIECE else float("inf")
        tl.store(log + row_M, tl.where(reads_M, peak_M + tl.log2(some_M), none), mask=is_row_M)


@triton.jit(do_not_specialize=["pieces", "rows"])
def _combine(
    parts,
    logs,
    out,
    log,
    pieces,
    rows,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):
    """Write rows' outputs from those of their pieces, each weighed by its part of the softmax's sum."""
    row_M = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_V = tl.arange(0, VALUE_WIDTH)
    peak_M = tl.full([ROWS], -float("inf"), tl.float32)
    sum_M = tl.full([ROWS], 0.0, tl.float32)
    out_MV = tl.full([ROWS, VALUE_WIDTH], 0.0, tl.float32)
    for first in range(0, pieces, PIECES):
        piece_P = first + tl.arange(0, PIECES)
        at_MP = piece_P.to(tl.int64)[None, :] * rows + row_M[:, None]
        is_part_MP = (row_M < rows)[:, None] & (piece_P < pieces)[None, :]
        log_MP = tl.load(logs + at_MP, mask=is_part_MP, other=-float("inf"))
        higher_M = tl.maximum(peak_M, tl.max(log_MP, 1))
        shift_M = tl.where(higher_M == -float("inf"), 0.0, higher_M)
        weight_MP = tl.exp2(log_MP - shift_M[:, None])
        shrink_M = tl.exp2(peak_M - shift_M)
        is_part_MPV = is_part_MP[:, :, None] & (column_V < V)[None, None, :]
        part_MPV = tl.load(parts + at_MP[:, :, None] * V + column_V[None, None, :], mask=is_part_MPV, other=0.0)
        out_MV = out_MV * shrink_M[:, None] + tl.sum(part_MPV * weight_MP[:, :, None], 1)
        sum_M = sum_M * shrink_M + tl.sum(weight_MP, 1)
        peak_M = higher_M
    some_M = tl.where(sum_M > 0, sum_M, 1.0)
    is_out_MV = (row_M < rows)[:, None] & (column_V < V)[None, :]
    out_MV = (out_MV / some_M[:, None]).to(out.dtype.element_ty)
    tl.store(out + row_M[:, None] * V + column_V[None, :], out_MV, mask=is_out_MV)
    if log is not None:
        tl.store(log + row_M, tl.where(sum_M > 0, peak_M + tl.log2(some_M), float("inf")), mask=row_M < rows)
