"""The definition of block-sparse attention: token by token, group by group, in float64; no tricks, for tests."""

import torch
from torch import Tensor

from sala.ops.infllm.geometry import SparseGeometry, num_windows


@torch.no_grad()
def select(
    q_BTHK: Tensor, k1_BNGK: Tensor, k2_BNGK: Tensor, positions_BT: Tensor, geometry: SparseGeometry, scale: float
) -> Tensor:
    """Return (B, T, G, num_selected) int32 block indices, ascending, -1 at the end; see `select_blocks`."""
    B, T, H, _ = q_BTHK.shape
    G = k1_BNGK.shape[2]
    table_BTGN = torch.full((B, T, G, geometry.num_selected), -1, dtype=torch.int32)
    for b in range(B):
        for t in range(T):
            position = int(positions_BT[b, t])
            if position < 0:
                continue
            for g in range(G):
                heads = slice(g * (H // G), (g + 1) * (H // G))
                blocks = _select_one(
                    q_BTHK[b, t, heads].double(),
                    k1_BNGK[b, :, g].double(),
                    k2_BNGK[b, :, g].double(),
                    position,
                    geometry,
                    scale,
                )
                table_BTGN[b, t, g, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return table_BTGN.to(q_BTHK.device)


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
    B, T, H, _ = q_BTHK.shape
    G = k_BSGK.shape[2]
    if start is not None:
        positions_BT = torch.arange(start, start + T).expand(B, T)
    assert positions_BT is not None
    table_BTGN = select(q_BTHK, k1_BNGK, k2_BNGK, positions_BT, geometry, scale)
    rows = []
    for b in range(B):
        for t in range(T):
            position = int(positions_BT[b, t])
            context = position + 1 if geometry.dense_rule == "position" else int(positions_BT[b].max()) + 1
            for h in range(H):
                g = h // (H // G)
                if position < 0:
                    rows.append(v_BSGV.new_zeros(v_BSGV.shape[-1]))
                    continue
                seen_s = torch.arange(position + 1, device=k_BSGK.device)
                if context >= geometry.dense_len:
                    seen_s = seen_s[torch.isin(seen_s // geometry.block_size, table_BTGN[b, t, g])]
                scores_s = scale * k_BSGK[b, seen_s, g].double() @ q_BTHK[b, t, h].double()
                rows.append((scores_s.softmax(0) @ v_BSGV[b, seen_s, g].double()).to(v_BSGV.dtype))
    return torch.stack(rows).view(B, T, H, -1)


def _select_one(
    q_HK: Tensor, k1_NK: Tensor, k2_NK: Tensor, position: int, geometry: SparseGeometry, scale: float
) -> list[int]:
    own_block = position // geometry.block_size
    scores = _block_scores(q_HK, k1_NK, k2_NK, position, geometry, scale)
    for block in range(own_block + 1):
        if block < geometry.init_blocks or block >= own_block - geometry.local_blocks:
            scores[block] = float("inf")
    # equal scores: the lower index first
    best = sorted(range(own_block + 1), key=lambda block: (-scores[block], block))
    return sorted(best[: geometry.num_selected])


def _block_scores(
    q_HK: Tensor, k1_NK: Tensor, k2_NK: Tensor, position: int, geometry: SparseGeometry, scale: float
) -> list[float]:
    fine = num_windows(position + 1, geometry.kernel_size, geometry.kernel_stride)
    coarse = num_windows(position + 1, geometry.coarse_size, geometry.coarse_stride)
    scores_HN = scale * q_HK @ k1_NK[:fine].T
    if geometry.normalizer == "coarse" and coarse:
        normalizer_H = (scale * q_HK @ k2_NK[:coarse].T).logsumexp(-1)
    else:
        normalizer_H = scores_HN.logsumexp(-1)
    shares_N = (scores_HN - normalizer_H[:, None]).exp().sum(0).tolist()
    blocks = [0.0] * (position // geometry.block_size + 1)
    for window, share in enumerate(shares_N):
        first_token = window * geometry.kernel_stride
        last_token = first_token + geometry.kernel_size - 1
        for block in range(first_token // geometry.block_size, last_token // geometry.block_size + 1):
            blocks[block] = max(blocks[block], share)
    return blocks
