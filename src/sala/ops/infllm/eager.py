"""Block-sparse attention in plain torch: streams over queries and windows, differentiable, on every device."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

from sala.errors import InputError
from sala.ops.dense import common_start, dense_attention, row_by_row
from sala.ops.infllm.geometry import SparseGeometry
from sala.ops.native.operator import mapped

# queries whose windows are scored in one product
SELECT_QUERIES = 128
# queries that share the reading of blocks
ATTEND_QUERIES = 1024
# of them, the most that one product over a block takes
MAX_ITEM_QUERIES = 64
# with fewer rows than this on the left, a product of matrices is faster the other way round (decoding: 4 times)
FEW_ROWS = 32
# scores alive at a time: what stays in a core's cache
SCORE_ELEMENTS = 2**18


def compress(k_BSGK: Tensor, size: int, stride: int) -> Tensor:
    """Return (B, N, G, K) means of the complete windows; see `sala.ops.infllm.compress`."""
    B, S, G, K = k_BSGK.shape
    if size > S:
        return k_BSGK.new_empty(B, 0, G, K)
    windows_BNGKC = k_BSGK.unfold(1, size, stride)
    return (windows_BNGKC.sum(-1, dtype=torch.float32) / size).to(k_BSGK.dtype)


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
        for tile_C in real_n.split(SELECT_QUERIES):
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
        parts.append(
            dense_attention(q_BTHK[:, :num_dense], k_BSGK, v_BSGV, None, scale=scale, start=start, backend="eager")
        )
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
        dense_1dHV = dense_attention(
            q_1nHK[:, dense_d], k_1SGK, v_1SGV, positions_n[None, dense_d], scale=scale, backend="eager"
        )
        out_nHV = out_nHV.index_copy(0, dense_d, dense_1dHV[0])
    if len(sparse_s):
        sparse_sHV = _attend_sparse(
            q_1nHK[0, sparse_s], k_1SGK[0], v_1SGV[0], k1_NGK, k2_NGK, positions_n[sparse_s], geometry, scale
        )
        out_nHV = out_nHV.index_copy(0, sparse_s, sparse_sHV)
    return out_nHV[None]


# which blocks are read depends on data: nothing here that a compiler could trace
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
    """Return (T, H, V) for queries of one row, a tile at a time."""
    if mapped():
        raise InputError(
            "vmap over queries that choose blocks: every row reads others; expected torch.func.grad, row by row"
        )
    # what lies behind the last key need not be a number, and a weight of zero would not hide it
    num_keys = int(positions_T.max()) + 1
    k_SGK, v_SGV = k_SGK[:num_keys].contiguous(), v_SGV[:num_keys].contiguous()
    parts = []
    for q_CHK, positions_C in zip(q_THK.split(ATTEND_QUERIES), positions_T.split(ATTEND_QUERIES), strict=True):
        tables = [
            _select_tile(q_cHK, k1_NGK, k2_NGK, positions_c, geometry, scale)
            for q_cHK, positions_c in zip(
                q_CHK.detach().split(SELECT_QUERIES), positions_C.split(SELECT_QUERIES), strict=True
            )
        ]
        if len(q_CHK) == 1:
            parts.append(
                _attend_one(q_CHK, k_SGK, v_SGV, tables[0][0], int(positions_C[0]), geometry.block_size, scale)
            )
        else:
            work = _share_blocks(torch.cat(tables), positions_C, geometry.block_size)
            parts.append(_BlockAttention.apply(q_CHK, k_SGK, v_SGV, work, scale)[0])
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


def _products(q_GMK: Tensor, keys_NGK: Tensor) -> Tensor:
    """Return (G, M, N) in float32."""
    keys_GNK = keys_NGK.float().transpose(0, 1)
    if q_GMK.shape[1] < FEW_ROWS:
        return torch.bmm(keys_GNK, q_GMK.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(q_GMK, keys_GNK.transpose(1, 2))


def _log_sum_exp(q_GMK: Tensor, keys_NGK: Tensor, visible_C: Tensor) -> Tensor:
    G, M, _ = q_GMK.shape
    C = len(visible_C)
    first, last = int(visible_C.min()), int(visible_C.max())
    width = max(1, SCORE_ELEMENTS // (G * M))
    total_GM = torch.full((G, M), -torch.inf, device=q_GMK.device)
    for begin in range(0, last, width):
        end = min(begin + width, last)
        scores_GMN = _products(q_GMK, keys_NGK[begin:end])
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
    width = max(1, SCORE_ELEMENTS // (G * M * step))
    for begin in range(0, num_blocks, width):
        # the windows that start in blocks begin..begin + width - 1
        windows = slice(begin * step, min((begin + width) * step, last))
        if windows.stop <= windows.start:
            break
        shares_GMN = _products(q_GMK, k1_NGK[windows]).sub_(normalizer_GM[..., None]).exp_()
        shares_GCN = shares_GMN.view(G, M // C, C, -1).sum(1)
        if windows.stop > first:
            index_N = torch.arange(windows.start, windows.stop, device=q_GMK.device)
            shares_GCN.masked_fill_(index_N >= visible_C[:, None], 0)
        # pooling by a window's offset in its block is a maximum of whole tensors
        for offset in range(step):
            offset_GCN = shares_GCN[..., offset::step]
            last_token = offset * geometry.kernel_stride + geometry.kernel_size - 1
            for shift in range(last_token // geometry.block_size + 1):
                pooled_GCN = scores_GCN[..., begin + shift : begin + shift + offset_GCN.shape[-1]]
                torch.maximum(pooled_GCN, offset_GCN[..., : pooled_GCN.shape[-1]], out=pooled_GCN)


def _attend_one(
    q_1HK: Tensor, k_SGK: Tensor, v_SGV: Tensor, table_GN: Tensor, position: int, block_size: int, scale: float
) -> Tensor:
    G, K = k_SGK.shape[1:]
    # all blocks are full but the last, the query's own: every group reads as many tokens, and nothing is masked
    num_full = int((table_GN[0] >= 0).sum()) - 1
    tokens_GNC = table_GN[:, : num_full + 1, None] * block_size + torch.arange(block_size, device=q_1HK.device)
    tokens_GS = tokens_GNC.flatten(1)[:, : num_full * block_size + position % block_size + 1]
    places_GS = tokens_GS * G + torch.arange(G, device=q_1HK.device)[:, None]
    k_1GSK, v_1GSV = (
        x_SGK.flatten(0, 1).index_select(0, places_GS.flatten()).view(1, *places_GS.shape, -1)
        for x_SGK in (k_SGK, v_SGV)
    )
    out_1GHV = scaled_dot_product_attention(q_1HK.view(1, G, -1, K), k_1GSK, v_1GSV, scale=scale)
    return out_1GHV.reshape(1, q_1HK.shape[1], -1)


@dataclass(frozen=True, slots=True)
class _Work:
    """Pairs of a query and a block it chose, put together by block, so that a block is read once for many queries.

    One item is a block of one group with up to M of the queries that chose it.

    Attributes:
        group_P: (P,) the group each item belongs to.
        tokens_PS: (P, block_size) the tokens of each item's block.
        queries_PM: (P, M) indices of queries; the number of queries where an item has fewer than M.
        limits_PM: (P, M) the last token each of them may see.
        masked_P: (P,) whether the block holds tokens that a query of the item may not see.
    """

    group_P: Tensor
    tokens_PS: Tensor
    queries_PM: Tensor
    limits_PM: Tensor
    masked_P: Tensor


def _share_blocks(table_CGN: Tensor, positions_C: Tensor, block_size: int) -> _Work:
    C, G, _ = table_CGN.shape
    num_blocks = int(positions_C.max()) // block_size + 1
    device = table_CGN.device
    pair_query_P, pair_group_P, column_P = (table_CGN >= 0).nonzero().unbind(1)
    key_P = pair_group_P * num_blocks + table_CGN[pair_query_P, pair_group_P, column_P]
    key_P, order_P = key_P.sort()
    count_N = key_P.bincount(minlength=G * num_blocks)
    # wide items make better products, narrow ones waste fewer of their places
    mean_queries = len(key_P) // int(count_N.count_nonzero())
    M = min(MAX_ITEM_QUERIES, 1 << max(0, mean_queries.bit_length() - 1))
    items_N = (count_N + M - 1) // M
    rank_P = torch.arange(len(key_P), device=device) - (count_N.cumsum(0) - count_N)[key_P]
    item_P = (items_N.cumsum(0) - items_N)[key_P] + rank_P // M
    keys_I = torch.arange(G * num_blocks, device=device).repeat_interleave(items_N)
    queries_IM = torch.full((len(keys_I), M), C, device=device)
    queries_IM[item_P, rank_P % M] = pair_query_P[order_P]
    tokens_IS = (keys_I % num_blocks)[:, None] * block_size + torch.arange(block_size, device=device)
    # the place of no query sees everything: its result is dropped, but must be a number
    limits_IM = pad(positions_C, (0, 1), value=num_blocks * block_size)[queries_IM]
    return _Work(keys_I // num_blocks, tokens_IS, queries_IM, limits_IM, limits_IM.amin(1) < tokens_IS[:, -1])


class _BlockAttention(torch.autograd.Function):
    """Softmax attention over pairs of queries and blocks: one pass with a running maximum, and its gradient.

    The forward pass is FlashAttention's (arXiv 2205.14135, algorithm 1), the order of the blocks free; the backward
    pass recomputes the probabilities from the log of their sum, so that memory is that of the inputs and outputs.
    """

    @staticmethod
    def forward(q_CHK: Tensor, k_SGK: Tensor, v_SGV: Tensor, work: _Work, scale: float) -> tuple[Tensor, Tensor]:
        C, H, _ = q_CHK.shape
        G, V = v_SGV.shape[1:]
        group = H // G
        wide = _wide(q_CHK)
        # one row for each query and group, and those of the query that is none
        peak_RH = torch.full(((C + 1) * G, group), -torch.inf, dtype=wide, device=q_CHK.device)
        total_RH = torch.zeros_like(peak_RH)
        out_RHV = peak_RH.new_zeros(*peak_RH.shape, V)
        rows_RHK = _rows(q_CHK, G)
        for item in _slices(work, group):
            rows_P, _, q_PMK, k_PSK, v_PSV = _read(item, rows_RHK, k_SGK, v_SGV)
            scores_PMHS = _scores(item, q_PMK, k_PSK, scale)
            best_RH = scores_PMHS.amax(-1).flatten(0, 1)
            higher_RH = peak_RH.scatter_reduce(0, rows_P[:, None].expand_as(best_RH), best_RH, "amax")
            shrink_RH = (peak_RH - higher_RH).exp_().nan_to_num_(0)
            peak_RH = higher_RH
            peak_PMH = peak_RH.index_select(0, rows_P).view(scores_PMHS.shape[:-1])
            probs_PMHS = scores_PMHS.sub_(peak_PMH[..., None]).exp_()
            total_RH.mul_(shrink_RH).index_add_(0, rows_P, probs_PMHS.sum(-1).flatten(0, 1))
            part_PMV = torch.bmm(probs_PMHS.flatten(1, 2).to(v_SGV.dtype), v_PSV)
            out_RHV.mul_(shrink_RH[..., None]).index_add_(0, rows_P, part_PMV.view(-1, group, V).to(wide))
        out_CHV = (out_RHV / total_RH[..., None]).view(C + 1, H, V)[:C].to(v_SGV.dtype)
        return out_CHV, peak_RH + total_RH.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        # beside the forward pass: torch.func asks for it
        *qkv, ctx.work, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*qkv, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CHV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_CHK, k_SGK, v_SGV, out_CHV, log_total_RH = ctx.saved_tensors
        C, H, K = q_CHK.shape
        G, V = v_SGV.shape[1:]
        group = H // G
        wide = _wide(q_CHK)
        rows_RHK, grads_RHV = _rows(q_CHK, G), _rows(grad_CHV, G)
        delta_RH = _rows((grad_CHV.to(wide) * out_CHV.to(wide)).sum(-1, keepdim=True), G).view(-1, group)
        # not in bfloat16: a key's gradient is the sum over every query that read it
        dq_RHK = torch.zeros((C + 1) * G, group, K, dtype=wide, device=q_CHK.device)
        dk_SGK = torch.zeros(k_SGK.shape, dtype=wide, device=q_CHK.device)
        dv_SGV = torch.zeros(v_SGV.shape, dtype=wide, device=q_CHK.device)
        for item in _slices(ctx.work, group):
            rows_P, places_P, q_PMK, k_PSK, v_PSV = _read(item, rows_RHK, k_SGK, v_SGV)
            scores_PMHS = _scores(item, q_PMK, k_PSK, ctx.scale)
            shape = scores_PMHS.shape
            probs_PMHS = scores_PMHS.sub_(log_total_RH.index_select(0, rows_P).view(shape[:-1])[..., None]).exp_()
            grad_PMV = grads_RHV.index_select(0, rows_P).view(shape[0], -1, V)
            back_PMHS = torch.bmm(grad_PMV, v_PSV.transpose(1, 2)).to(wide).view(shape)
            back_PMHS.sub_(delta_RH.index_select(0, rows_P).view(shape[:-1])[..., None]).mul_(probs_PMHS).mul_(
                ctx.scale
            )
            probs_PMS, back_PMS = probs_PMHS.flatten(1, 2).to(v_SGV.dtype), back_PMHS.flatten(1, 2).to(q_CHK.dtype)
            dq_RHK.index_add_(0, rows_P, torch.bmm(back_PMS, k_PSK).view(-1, group, K).to(wide))
            dk_PK = torch.bmm(back_PMS.transpose(1, 2), q_PMK).to(wide).flatten(0, 1)
            dv_PV = torch.bmm(probs_PMS.transpose(1, 2), grad_PMV).to(wide).flatten(0, 1)
            dk_SGK.view(-1, K).index_add_(0, places_P, dk_PK)
            dv_SGV.view(-1, V).index_add_(0, places_P, dv_PV)
        dq_CHK = dq_RHK.view(C + 1, H, K)[:C]
        return dq_CHK.to(q_CHK.dtype), dk_SGK.to(k_SGK.dtype), dv_SGV.to(v_SGV.dtype), None, None


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype of sums and of softmax: float32, or float64 where `x` is."""
    return torch.promote_types(x.dtype, torch.float32)


def _rows(x_CHK: Tensor, G: int) -> Tensor:
    """Return ((C + 1) * G, H / G, K): a row for each query and group, the last G of them zero, for no query."""
    C, H, K = x_CHK.shape
    return pad(x_CHK, (0, 0, 0, 0, 0, 1)).view((C + 1) * G, H // G, K)


def _slices(work: _Work, group: int) -> Iterator[_Work]:
    """Yield the items, as many at a time as have at most SCORE_ELEMENTS scores."""
    M, S = work.queries_PM.shape[1], work.tokens_PS.shape[1]
    width = max(1, SCORE_ELEMENTS // (M * group * S))
    parts = (getattr(work, field.name).split(width) for field in fields(work))
    for tensors in zip(*parts, strict=True):
        yield _Work(*tensors)


def _read(item: _Work, rows_RHK: Tensor, k_SGK: Tensor, v_SGV: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the items' rows (P * M,), places (P * S,), queries (P, M * H / G, K), keys (P, S, K), values (P, S, V).

    Places are indices into the tokens and groups of `k_SGK` as one dimension: index_select copies whole vectors, five
    times as fast as indexing.
    """
    P, S = item.tokens_PS.shape
    G = k_SGK.shape[1]
    rows_P = (item.queries_PM * G + item.group_P[:, None]).flatten()
    # past the end of the keys every query masks
    places_P = (item.tokens_PS.clamp(max=len(k_SGK) - 1) * G + item.group_P[:, None]).flatten()
    q_PMK = rows_RHK.index_select(0, rows_P).view(P, -1, rows_RHK.shape[-1])
    k_PSK, v_PSV = (x_SGK.flatten(0, 1).index_select(0, places_P).view(P, S, -1) for x_SGK in (k_SGK, v_SGV))
    return rows_P, places_P, q_PMK, k_PSK, v_PSV


def _scores(item: _Work, q_PMK: Tensor, k_PSK: Tensor, scale: float) -> Tensor:
    """Return scores (P, M, H / G, S) in float32 or wider, -inf where a query may not see a token."""
    P, M = item.queries_PM.shape
    scores_PMHS = torch.bmm(q_PMK, k_PSK.transpose(1, 2)).to(_wide(q_PMK)).mul_(scale).view(P, M, -1, k_PSK.shape[1])
    if item.masked_P.any():
        later_PMS = item.tokens_PS[:, None] > item.limits_PM[..., None]
        scores_PMHS.masked_fill_(later_PMS[:, :, None], -torch.inf)
    return scores_PMHS
