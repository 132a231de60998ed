"""The gradient of attention over chosen blocks in Triton, from what the forward pass chose; no atomics, the same bits always.

Queries' gradients walk the same lists as the forward pass. For keys and values the table of chosen blocks is turned
round, some queries at a time: a block's program gathers the queries that chose it, fills its tile with them whichever
tiles they came from, and adds to what earlier queries left in float32. Memory is that of the inputs, and of the tables.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sala.ops import gpu
from sala.ops.infllm.triton.blocks import load_block, score_entry
from sala.ops.infllm.triton.score import PRECISION, rows_of_tile
from sala.ops.infllm.triton.select import LIST_BITS, list_tile, padded, stages, tile_keys

# queries whose table is turned round at a time; the first blocks are chosen by all of them, and one program reads them
QUERIES = 8192


def _empty(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    # in the order of their dimensions, however the tensors lie in memory
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@gpu.operator(
    "infllm_triton_gradients(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor positions, Tensor out, Tensor log, "
    "Tensor lists, Tensor counts, Tensor table, int block_size, float scale) -> (Tensor, Tensor, Tensor)",
    _empty,
)
def gradients(
    grad_BTHV: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    positions_BT: Tensor,
    out_BTHV: Tensor,
    log_BTH: Tensor,
    lists_BGNL: Tensor,
    counts_BGN2: Tensor,
    table_BTGN: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, given that of `attend_lists`' output and what it read and kept."""
    B, T, H, K = q_BTHK.shape
    S, G, V = v_BSGV.shape[1:]
    dq_BTHK = torch.empty(B, T, H, K, dtype=q_BTHK.dtype, device=q_BTHK.device)
    # not in bfloat16: a key's gradient is the sum over every query that read it
    dk_BSGK = torch.zeros(B, S, G, K, dtype=torch.float32, device=q_BTHK.device)
    dv_BSGV = torch.zeros(B, S, G, V, dtype=torch.float32, device=q_BTHK.device)
    if not q_BTHK.numel():
        return dq_BTHK, dk_BSGK.to(k_BSGK.dtype), dv_BSGV.to(v_BSGV.dtype)
    delta_BTH = torch.empty_like(log_BTH)
    group, scale_log2 = H // G, scale * math.log2(math.e)
    tokens, heads = list_tile(T, group, v_BSGV.dtype, K, V)
    widths = [padded(K), padded(V)]
    keys = tile_keys(padded(block_size), v_BSGV.dtype, *widths)
    num_stages = stages(2, v_BSGV.dtype, *widths)
    warps = 8 if tokens * heads > 64 or max(widths) > 128 else 4
    # eight share the products of a tile badly, and are needed where its sums do not fit into the registers of four
    key_warps = 8 if max(widths) * v_BSGV.dtype.itemsize > 256 else 4
    tensors = [gpu.strided(x) for x in (grad_BTHV, q_BTHK, k_BSGK, v_BSGV)]
    _queries[triton.cdiv(T, tokens), B * G](
        *tensors, out_BTHV, positions_BT, log_BTH, delta_BTH, lists_BGNL, counts_BGN2, dq_BTHK,
        T, lists_BGNL.shape[2], lists_BGNL.shape[3], scale_log2, scale, group, G, K, V,
        block_size, keys, tokens, heads, *widths, LIST_BITS, num_warps=warps, num_stages=num_stages,
    )  # fmt: skip
    num_blocks = triton.cdiv(S, block_size)
    for first in range(0, T, QUERIES):
        chunk = min(QUERIES, T - first)
        order, bounds = _turned(table_BTGN[:, first : first + chunk], num_blocks)
        _keys[num_blocks * triton.cdiv(block_size, keys), B * G](
            *tensors, positions_BT, log_BTH, delta_BTH, order, bounds, dk_BSGK, dv_BSGV,
            T, S, first, chunk, G * table_BTGN.shape[3], num_blocks, scale_log2, scale, group, G, K, V,
            block_size, keys, tokens, heads, *widths, num_warps=key_warps, num_stages=num_stages,
        )  # fmt: skip
    return dq_BTHK, dk_BSGK.to(k_BSGK.dtype), dv_BSGV.to(v_BSGV.dtype)


def _turned(table_BTGN: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return who chose each block: places in the table, by row, group and block, and where each block's begin."""
    B, _, G, _ = table_BTGN.shape
    row_BG = torch.arange(B * G, device=table_BTGN.device, dtype=torch.int32).view(B, 1, G, 1)
    key_P = torch.where(table_BTGN >= 0, row_BG * num_blocks + table_BTGN, B * G * num_blocks).flatten()
    key_P, order_P = key_P.sort(stable=True)
    blocks_N = torch.arange(B * G * num_blocks + 1, device=table_BTGN.device, dtype=torch.int32)
    return order_P, torch.searchsorted(key_P, blocks_N)


@triton.jit
def _walk_queries(
    b,
    g,
    grad_MV,
    q_MK,
    k,
    v,
    entries,
    begin,
    end,
    log_M,
    delta_M,
    dq_MK,
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
    EDGE: tl.constexpr,
):
    """Add what entries begin..end-1 of a list give the queries; EDGE where a row may not see some of their keys."""
    PARTS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    for i in range(begin * PARTS, end * PARTS):
        score_MN, k_NK, chose_M, row, place_N, is_key_N = score_entry(
            tl.load(entries + i // PARTS), i % PARTS, b, g, q_MK, k, None, place_M, position_M, K, scale_log2,
            BLOCK, KEYS, WIDTH, BITS, 0, EDGE,
        )  # fmt: skip
        v_NV = load_block(v, row, g, place_N, is_key_N, V, VALUE_WIDTH)
        weight_MN = tl.exp2(score_MN - tl.where(chose_M, log_M, float("inf"))[:, None])
        back_MN = tl.dot(grad_MV, tl.trans(v_NV), input_precision=PRECISION)
        back_MN = weight_MN * (back_MN - delta_M[:, None])
        dq_MK = tl.dot(back_MN.to(k_NK.dtype), k_NK, dq_MK, input_precision=PRECISION)
    return dq_MK


@triton.jit(do_not_specialize=["T", "tiles", "list_width"])
def _queries(
    grad,
    q,
    k,
    v,
    out,
    positions,
    log,
    delta,
    lists,
    counts,
    dq,
    T,
    tiles,
    list_width,
    scale_log2,
    scale,
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
):
    tile, bg = tl.program_id(0), tl.program_id(1)
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    token_M, head_M, is_row_M = rows_of_tile(tile, T, group, TOKENS, HEADS)
    place_M = tl.arange(0, TOKENS * HEADS) // HEADS
    column_K = tl.arange(0, WIDTH)
    column_V = tl.arange(0, VALUE_WIDTH)
    position_M = tl.load(positions + b * T + token_M, mask=is_row_M, other=-1)
    is_query_MK = (position_M >= 0)[:, None] & (column_K < K)[None, :]
    is_query_MV = (position_M >= 0)[:, None] & (column_V < V)[None, :]
    head_M = g * group + head_M
    at_MK = q.at + b * q.row + token_M.to(tl.int64)[:, None] * q.place + head_M[:, None] * q.head
    q_MK = tl.load(at_MK + column_K[None, :], mask=is_query_MK, other=0.0)
    at_MV = grad.at + b * grad.row + token_M.to(tl.int64)[:, None] * grad.place + head_M[:, None] * grad.head
    grad_MV = tl.load(at_MV + column_V[None, :], mask=is_query_MV, other=0.0)
    row_M = (b * T + token_M) * (G * group) + head_M
    out_MV = tl.load(out + row_M[:, None] * V + column_V[None, :], mask=is_query_MV, other=0.0)
    delta_M = tl.sum(out_MV.to(tl.float32) * grad_MV.to(tl.float32), 1)
    tl.store(delta + row_M, delta_M, mask=is_row_M)
    log_M = tl.load(log + row_M, mask=is_row_M, other=float("inf"))
    at = bg.to(tl.int64) * tiles + tile
    free, end = tl.load(counts + 2 * at), tl.load(counts + 2 * at + 1)
    entries = lists + at * list_width
    dq_MK = tl.full([TOKENS * HEADS, WIDTH], 0.0, tl.float32)
    dq_MK = _walk_queries(
        b, g, grad_MV, q_MK, k, v, entries, 0, free, log_M, delta_M, dq_MK, place_M, position_M, K, V, scale_log2,
        BLOCK, KEYS, WIDTH, VALUE_WIDTH, BITS, False,
    )  # fmt: skip
    dq_MK = _walk_queries(
        b, g, grad_MV, q_MK, k, v, entries, free, end, log_M, delta_M, dq_MK, place_M, position_M, K, V, scale_log2,
        BLOCK, KEYS, WIDTH, VALUE_WIDTH, BITS, True,
    )  # fmt: skip
    at_MK = dq + row_M[:, None] * K + column_K[None, :]
    tl.store(at_MK, (dq_MK * scale).to(dq.dtype.element_ty), mask=is_row_M[:, None] & (column_K < K)[None, :])


@triton.jit(do_not_specialize=["T", "S", "first_token", "chunk", "token_places", "num_blocks"])
def _keys(
    grad,
    q,
    k,
    v,
    positions,
    log,
    delta,
    order,
    bounds,
    dk,
    dv,
    T,
    S,
    first_token,
    chunk,
    token_places,
    num_blocks,
    scale_log2,
    scale,
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
):
    PARTS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    block, part, bg = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    begin = tl.load(bounds + bg * num_blocks + block)
    end = tl.load(bounds + bg * num_blocks + block + 1)
    if begin < end:
        row_M = tl.arange(0, TOKENS * HEADS)
        head_M = g * group + row_M % HEADS
        is_head_M = row_M % HEADS < group
        column_K = tl.arange(0, WIDTH)
        column_V = tl.arange(0, VALUE_WIDTH)
        key_N = part * KEYS + tl.arange(0, KEYS)
        token_N = block * BLOCK + key_N
        is_key_N = (key_N < BLOCK) & (token_N < S)
        is_key_NK = is_key_N[:, None] & (column_K < K)[None, :]
        is_key_NV = is_key_N[:, None] & (column_V < V)[None, :]
        k_NK = load_block(k, b, g, token_N, is_key_N, K, WIDTH)
        v_NV = load_block(v, b, g, token_N, is_key_N, V, VALUE_WIDTH)
        dk_NK = tl.full([KEYS, WIDTH], 0.0, tl.float32)
        dv_NV = tl.full([KEYS, VALUE_WIDTH], 0.0, tl.float32)
        for first in range(begin, end, TOKENS):
            place_M = first + row_M // HEADS
            is_row_M = (place_M < end) & is_head_M
            # a place in the table is one of a token's, and tokens are counted row after row of the chunk
            token_M = tl.load(order + place_M, mask=is_row_M, other=0) // token_places % chunk + first_token
            position_M = tl.load(positions + b * T + token_M, mask=is_row_M, other=-1)
            at_M = (b * T + token_M) * (G * group) + head_M
            log_M = tl.load(log + at_M, mask=is_row_M, other=float("inf"))
            delta_M = tl.load(delta + at_M, mask=is_row_M, other=0.0)
            at_MK = q.at + b * q.row + token_M[:, None] * q.place + head_M[:, None] * q.head
            is_query_MK = is_row_M[:, None] & (column_K < K)[None, :]
            q_MK = tl.load(at_MK + column_K[None, :], mask=is_query_MK, other=0.0)
            at_MV = grad.at + b * grad.row + token_M[:, None] * grad.place + head_M[:, None] * grad.head
            is_query_MV = is_row_M[:, None] & (column_V < V)[None, :]
            grad_MV = tl.load(at_MV + column_V[None, :], mask=is_query_MV, other=0.0)
            score_NM = tl.dot(k_NK, tl.trans(q_MK), input_precision=PRECISION) * scale_log2
            # a key past every query's position need not be a number
            seen_NM = is_key_N[:, None] & (token_N[:, None] <= position_M[None, :])
            weight_NM = tl.exp2(tl.where(seen_NM, score_NM, -float("inf")) - log_M[None, :])
            dv_NV = tl.dot(weight_NM.to(grad_MV.dtype), grad_MV, dv_NV, input_precision=PRECISION)
            back_NM = tl.dot(v_NV, tl.trans(grad_MV), input_precision=PRECISION) - delta_M[None, :]
            back_NM = tl.where(seen_NM, weight_NM * back_NM, 0.0)
            dk_NK = tl.dot(back_NM.to(q_MK.dtype), q_MK, dk_NK, input_precision=PRECISION)
        # no other program has this block
        at_NK = dk + ((b * S + token_N) * G + g)[:, None] * K + column_K[None, :]
        tl.store(at_NK, tl.load(at_NK, mask=is_key_NK, other=0.0) + dk_NK * scale, mask=is_key_NK)
        at_NV = dv + ((b * S + token_N) * G + g)[:, None] * V + column_V[None, :]
        tl.store(at_NV, tl.load(at_NV, mask=is_key_NV, other=0.0) + dv_NV, mask=is_key_NV)
