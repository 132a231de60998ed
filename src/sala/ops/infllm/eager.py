"""Block-sparse attention in plain torch: streams over queries and windows, differentiable, on every device."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from sala.ops.dense import common_start, dense_attention, recomputed, row_by_row
from sala.ops.infllm.geometry import SparseGeometry

# queries that are scored together, and whose attention may share one read of keys
TILE_QUERIES = 128
# scores of windows alive at a time: what stays in a core's cache
SCORE_ELEMENTS = 2**18

# What attending costs, in units of one query's attention over one block; measured on a CPU core with 2 heads a group
# of width 64. Gathering a block costs as much as letting this many queries attend to it,
GATHER_COST = 12
# and calling the kernel once more as much as this many blocks for one query.
CALL_COST = 200


@torch.no_grad()
@torch.compiler.disable
def select(
    q_BTHK: Tensor, k1_BNGK: Tensor, k2_BNGK: Tensor, positions_BT: Tensor, geometry: SparseGeometry, scale: float
) -> Tensor:
    """Return (B, T, G, num_selected) int32 block indices, ascending, -1 at the end; see `select_blocks`."""
    B, T, _, _ = q_BTHK.shape
    table_BTGN = torch.full(
        (B, T, k1_BNGK.shape[2], geometry.num_selected), -1, dtype=torch.int32, device=q_BTHK.device
    )
    for b in range(B):
        real_n = (positions_BT[b] >= 0).nonzero().squeeze(1)
        for tile_C in real_n.split(TILE_QUERIES):
            table_BTGN[b, tile_C] = _select_tile(
                q_BTHK[b, tile_C], k1_BNGK[b], k2_BNGK[b], positions_BT[b, tile_C], geometry, scale
            ).int()
    return table_BTGN


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
) -> Tensor:
    """Return (B, T, H, V) in v's dtype, differentiable through q, k and v; see `infllm_attention`."""
    if start is None:
        assert positions_BT is not None
        start = common_start(positions_BT)
        if start is None:
            return row_by_row(
                lambda b, q_1nHK, positions_n, row_start: _attend_row(
                    q_1nHK,
                    k_BSGK[b : b + 1],
                    v_BSGV[b : b + 1],
                    k1_BNGK[b],
                    k2_BNGK[b],
                    positions_n,
                    geometry,
                    scale,
                    row_start,
                ),
                q_BTHK,
                v_BSGV.shape[-1],
                positions_BT,
            )
    T = q_BTHK.shape[1]
    num_dense = min(T, max(0, geometry.first_sparse_position(start + T - 1) - start))
    parts = []
    if num_dense:
        parts.append(dense_attention(q_BTHK[:, :num_dense], k_BSGK, v_BSGV, None, scale=scale, start=start))
    if num_dense < T:
        positions_T = torch.arange(start + num_dense, start + T, device=q_BTHK.device)
        rows = [
            _attend_sparse(
                q_BTHK[b, num_dense:], k_SGK, v_BSGV[b], k1_BNGK[b], k2_BNGK[b], positions_T, geometry, scale
            )
            for b, k_SGK in enumerate(k_BSGK)
        ]
        parts.append(torch.stack(rows))
    return torch.cat(parts, dim=1)


def _attend_row(
    q_1nHK: Tensor,
    k_1SGK: Tensor,
    v_1SGV: Tensor,
    k1_NGK: Tensor,
    k2_NGK: Tensor,
    positions_n: Tensor,
    geometry: SparseGeometry,
    scale: float,
    start: int | None,
) -> Tensor:
    if start is not None:
        return attend(q_1nHK, k_1SGK, v_1SGV, k1_NGK[None], k2_NGK[None], None, geometry, scale, start)
    sparse_n = positions_n >= geometry.first_sparse_position(int(positions_n.max()))
    dense_d, sparse_s = (~sparse_n).nonzero().squeeze(1), sparse_n.nonzero().squeeze(1)
    out_nHV = q_1nHK.new_zeros(*q_1nHK.shape[1:3], v_1SGV.shape[-1])
    if len(dense_d):
        dense_1dHV = dense_attention(q_1nHK[:, dense_d], k_1SGK, v_1SGV, positions_n[None, dense_d], scale=scale)
        out_nHV = out_nHV.index_copy(0, dense_d, dense_1dHV[0])
    if len(sparse_s):
        sparse_sHV = _attend_sparse(
            q_1nHK[0, sparse_s], k_1SGK[0], v_1SGV[0], k1_NGK, k2_NGK, positions_n[sparse_s], geometry, scale
        )
        out_nHV = out_nHV.index_copy(0, sparse_s, sparse_sHV)
    return out_nHV[None]


# which blocks a tile reads depends on data: nothing here that a compiler could trace
@torch.compiler.disable
def _attend_sparse(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    k1_NGK: Tensor,
    k2_NGK: Tensor,
    positions_T: Tensor,
    geometry: SparseGeometry,
    scale: float,
) -> Tensor:
    parts = []
    for q_CHK, positions_C in zip(q_THK.split(TILE_QUERIES), positions_T.split(TILE_QUERIES), strict=True):
        table_CGN = _select_tile(q_CHK, k1_NGK, k2_NGK, positions_C, geometry, scale)
        if len(q_CHK) == 1:
            # one query's blocks are all full but its own, the last: nothing to mask
            num_tokens = int((table_CGN[0, 0] >= 0).sum() - 1) * geometry.block_size
            num_tokens += int(positions_C[0]) % geometry.block_size + 1
            parts.append(_attend_one(q_CHK, k_SGK, v_SGV, table_CGN[0], num_tokens, geometry.block_size, scale))
            continue
        num_blocks = int(positions_C.max()) // geometry.block_size + 1
        chosen_GCN = torch.zeros(
            k_SGK.shape[1], len(q_CHK), num_blocks + 1, dtype=torch.bool, device=q_CHK.device
        ).scatter_(2, table_CGN.transpose(0, 1).masked_fill(table_CGN.transpose(0, 1) < 0, num_blocks), True)
        for piece in _pieces(chosen_GCN[..., :num_blocks], slice(0, len(q_CHK))):
            parts.append(
                recomputed(
                    _attend_union,
                    q_CHK[piece],
                    k_SGK,
                    v_SGV,
                    chosen_GCN[:, piece, :num_blocks],
                    positions_C[piece],
                    geometry.block_size,
                    scale,
                )
            )
    return torch.cat(parts)


@torch.no_grad()
def _select_tile(
    q_CHK: Tensor, k1_NGK: Tensor, k2_NGK: Tensor, positions_C: Tensor, geometry: SparseGeometry, scale: float
) -> Tensor:
    """Return (C, G, num_selected) int64 block indices, ascending, -1 at the end, for queries of one row."""
    own_C1 = positions_C[:, None] // geometry.block_size
    num_blocks = int(own_C1.max()) + 1
    C, H, K = q_CHK.shape
    G = k1_NGK.shape[1]
    scores_GCN = torch.zeros(G, C, num_blocks, device=q_CHK.device)
    if num_blocks > geometry.num_selected:
        # a group's heads and the tile's queries as rows of one product
        q_GMK = (q_CHK.float() * scale).view(C, G, H // G, K).permute(1, 2, 0, 3).reshape(G, -1, K)
        normalizer_GM = _log_normalizer(q_GMK, k1_NGK, k2_NGK, positions_C, geometry)
        _score_blocks(scores_GCN, q_GMK, normalizer_GM, k1_NGK, positions_C, geometry)
    blocks_N = torch.arange(num_blocks, device=q_CHK.device)
    forced_CN = (blocks_N < geometry.init_blocks) | (blocks_N >= own_C1 - geometry.local_blocks)
    # a float32 that is not negative sorts as its bits do; below them the index, so that no two ranks are equal
    # and the lower index wins
    scores_GCN.clamp_(max=torch.finfo(torch.float32).max).masked_fill_(forced_CN, torch.inf)
    rank_GCN = (scores_GCN.view(torch.int32).long() << 32) - blocks_N
    rank_GCN.masked_fill_(blocks_N > own_C1, torch.iinfo(torch.int64).min)
    best_GCN = rank_GCN.topk(min(geometry.num_selected, num_blocks), sorted=False).indices
    table_GCN = best_GCN.masked_fill_(best_GCN > own_C1, num_blocks).sort().values
    table_GCN = table_GCN.masked_fill_(table_GCN == num_blocks, -1)
    return pad(table_GCN, (0, geometry.num_selected - table_GCN.shape[-1]), value=-1).transpose(0, 1)


def _num_visible(positions_C: Tensor, size: int, stride: int) -> Tensor:
    return ((positions_C + 1 - size) // stride + 1).clamp(min=0)


def _log_normalizer(
    q_GMK: Tensor, k1_NGK: Tensor, k2_NGK: Tensor, positions_C: Tensor, geometry: SparseGeometry
) -> Tensor:
    """Return (G, heads * queries): log of the sum of exp(score) over the windows that weigh a head in its group."""
    visible_C = _num_visible(positions_C, geometry.kernel_size, geometry.kernel_stride)
    if geometry.normalizer == "exact":
        return _log_sum_exp(q_GMK, k1_NGK, visible_C)
    coarse_C = _num_visible(positions_C, geometry.coarse_size, geometry.coarse_stride)
    normalizer_GM = _log_sum_exp(q_GMK, k2_NGK, coarse_C)
    if int(coarse_C.min()):
        return normalizer_GM
    exact_GM = _log_sum_exp(q_GMK, k1_NGK, visible_C.masked_fill(coarse_C > 0, 0))
    return torch.where(normalizer_GM == -torch.inf, exact_GM, normalizer_GM)


def _log_sum_exp(q_GMK: Tensor, keys_NGK: Tensor, visible_C: Tensor) -> Tensor:
    G, M, _ = q_GMK.shape
    C = len(visible_C)
    first, last = int(visible_C.min()), int(visible_C.max())
    width = max(1, SCORE_ELEMENTS // (G * M))
    total_GM = torch.full((G, M), -torch.inf, device=q_GMK.device)
    for begin in range(0, last, width):
        end = min(begin + width, last)
        scores_GMN = torch.bmm(q_GMK, keys_NGK[begin:end].float().permute(1, 2, 0))
        if end > first:
            hidden_CN = torch.arange(begin, end, device=q_GMK.device) >= visible_C[:, None]
            scores_GMN.view(G, M // C, C, -1).masked_fill_(hidden_CN, -torch.inf)
        total_GM = torch.logaddexp(total_GM, scores_GMN.logsumexp(-1))
    return total_GM


def _score_blocks(
    scores_GCN: Tensor,
    q_GMK: Tensor,
    normalizer_GM: Tensor,
    k1_NGK: Tensor,
    positions_C: Tensor,
    geometry: SparseGeometry,
) -> None:
    """Raise each block's score, zero on entry, to the best of the visible windows that overlap it, in place."""
    G, M, _ = q_GMK.shape
    C, num_blocks = scores_GCN.shape[1:]
    visible_C = _num_visible(positions_C, geometry.kernel_size, geometry.kernel_stride)
    first, last = int(visible_C.min()), int(visible_C.max())
    step = geometry.block_size // geometry.kernel_stride
    width = max(1, SCORE_ELEMENTS // (G * M))
    for begin in range(0, num_blocks, width):
        # the windows that start in blocks begin.. at one offset: pooling is then a maximum of whole tensors
        for offset in range(step):
            end = min(begin + width, (last - offset + step - 1) // step)
            if end <= begin:
                continue
            windows = slice(begin * step + offset, (end - 1) * step + offset + 1, step)
            keys_GKN = k1_NGK[windows].float().permute(1, 2, 0)
            shares_GMN = torch.baddbmm(-normalizer_GM[..., None], q_GMK, keys_GKN).exp_()
            shares_GCN = shares_GMN.view(G, M // C, C, -1).sum(1)
            if windows.stop > first:
                index_N = torch.arange(windows.start, windows.stop, step, device=q_GMK.device)
                shares_GCN.masked_fill_(index_N >= visible_C[:, None], 0)
            last_token = offset * geometry.kernel_stride + geometry.kernel_size - 1
            for shift in range(last_token // geometry.block_size + 1):
                pooled_GCN = scores_GCN[..., begin + shift : end + shift]
                torch.maximum(pooled_GCN, shares_GCN[..., : pooled_GCN.shape[-1]], out=pooled_GCN)


def _pieces(chosen_GCN: Tensor, queries: slice) -> Iterator[slice]:
    """Yield runs of a tile's queries: halved for as long as reading the halves' blocks apart costs less."""
    middle = (queries.start + queries.stop) // 2
    halves = (slice(queries.start, middle), slice(middle, queries.stop))
    if middle == queries.start or _cost(chosen_GCN, queries) <= sum(_cost(chosen_GCN, half) for half in halves):
        yield queries
        return
    for half in halves:
        yield from _pieces(chosen_GCN, half)


def _cost(chosen_GCN: Tensor, queries: slice) -> int:
    num_queries = queries.stop - queries.start
    num_blocks = int(chosen_GCN[:, queries].any(1).sum(-1).max())
    return num_blocks * (num_queries + GATHER_COST) + CALL_COST


def _attend_one(
    q_1HK: Tensor, k_SGK: Tensor, v_SGV: Tensor, table_GN: Tensor, num_tokens: int, block_size: int, scale: float
) -> Tensor:
    G = k_SGK.shape[1]
    offsets_C = torch.arange(block_size, device=q_1HK.device)
    tokens_GS = (table_GN[..., None] * block_size + offsets_C).flatten(1)[:, :num_tokens]
    groups_G1 = torch.arange(G, device=q_1HK.device)[:, None]
    out_GHV = scaled_dot_product_attention(
        q_1HK.view(1, G, -1, q_1HK.shape[-1]),
        k_SGK[tokens_GS, groups_G1][None],
        v_SGV[tokens_GS, groups_G1][None],
        scale=scale,
    )
    return out_GHV.reshape(1, q_1HK.shape[1], -1)


def _attend_union(
    q_CHK: Tensor,
    k_SGK: Tensor,
    v_SGV: Tensor,
    chosen_GCN: Tensor,
    positions_C: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """Return (C, H, V): the blocks that any of the queries chose are read once, and each query masks the others'."""
    C, H, K = q_CHK.shape
    G, _, num_blocks = chosen_GCN.shape
    own_C = positions_C // block_size
    union_GN = chosen_GCN.any(1)
    num_read = int(union_GN.sum(-1).max())
    offsets_S = torch.arange(block_size, device=q_CHK.device)
    if 4 * num_read >= 3 * num_blocks:
        # nearly all: a copy would cost more than the blocks it leaves out
        length = min(num_blocks * block_size, k_SGK.shape[0])
        k_GSK, v_GSV = k_SGK[:length].transpose(0, 1), v_SGV[:length].transpose(0, 1)
        column_GC = own_C.expand(G, C)
    else:
        # the union's blocks in order, then, in the group that reads fewer, blocks that nobody chose
        read_GN = union_GN.byte().sort(descending=True, stable=True).indices[:, :num_read]
        tokens_GS = (read_GN[..., None] * block_size + offsets_S).flatten(1)
        length = tokens_GS.shape[1]
        tokens_GS = tokens_GS.clamp(max=k_SGK.shape[0] - 1)
        groups_G1 = torch.arange(G, device=q_CHK.device)[:, None]
        k_GSK, v_GSV = k_SGK[tokens_GS, groups_G1], v_SGV[tokens_GS, groups_G1]
        column_GC = (union_GN.cumsum(-1) - 1)[:, own_C]
        chosen_GCN = chosen_GCN.gather(2, read_GN[:, None].expand(G, C, num_read))
    bias_GCN = q_CHK.new_zeros(chosen_GCN.shape).masked_fill_(~chosen_GCN, -torch.inf)
    bias_GCNS = bias_GCN[..., None].repeat(1, 1, 1, block_size)
    # of a chosen block only a query's own has keys after it
    later_CS = q_CHK.new_zeros(C, block_size).masked_fill_(offsets_S > (positions_C % block_size)[:, None], -torch.inf)
    bias_GCNS.scatter_(
        2, column_GC[..., None, None].expand(G, C, 1, block_size), later_CS[None, :, None].expand(G, C, 1, block_size)
    )
    group = H // G
    out_GHCV = scaled_dot_product_attention(
        q_CHK.view(C, G, group, K).permute(1, 2, 0, 3),
        k_GSK[:, None].expand(-1, group, -1, -1),
        v_GSV[:, None].expand(-1, group, -1, -1),
        attn_mask=bias_GCNS.flatten(2)[:, None, :, :length],
        scale=scale,
    )
    return out_GHCV.permute(2, 0, 1, 3).reshape(C, H, -1)
