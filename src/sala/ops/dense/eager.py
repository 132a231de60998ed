"""Dense attention through torch's scaled_dot_product_attention: differentiable, on every device."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from sala.ops.dense.positions import common_start, row_by_row

# elements in the mask of one tile of queries: the most that is ever built, at any length
MASK_ELEMENTS = 2**23
# more queries a tile than this gain no speed
TILE_QUERIES = 512


def attend(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_BT: Tensor | None, scale: float, start: int | None
) -> Tensor:
    """Return (B, T, H, V) in v's dtype; see `dense_attention`."""
    if not q_BTHK.numel():
        return q_BTHK.new_zeros(*q_BTHK.shape[:3], v_BSGV.shape[3])
    if start is None:
        assert positions_BT is not None
        start = common_start(positions_BT)
        if start is None:
            return row_by_row(
                lambda b, q_1nHK, positions_n, row_start: _attend_row(
                    q_1nHK, k_BSGK[b : b + 1], v_BSGV[b : b + 1], positions_n, scale, row_start
                ),
                q_BTHK,
                v_BSGV.shape[-1],
                positions_BT,
            )
    return _attend_from(q_BTHK, k_BSGK, v_BSGV, scale, start)


def attend_static(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_BT: Tensor, scale: float) -> Tensor:
    """Return (B, T, H, V) over all S keys, those after a query's position hidden; see `dense_attention`."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    later_BTS = torch.arange(S, device=q_BTHK.device) > positions_BT[..., None]
    bias_BTS = q_BTHK.new_zeros(B, T, S).masked_fill_(later_BTS, -torch.inf)
    # a group's heads as rows of one product: keys and values are read once a group instead of once a head
    q_BGMK = q_BTHK.reshape(B, T, G, H // G, K).permute(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    bias_B1MS = bias_BTS.repeat(1, H // G, 1)[:, None]
    out_BGMV = scaled_dot_product_attention(
        q_BGMK, k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2), attn_mask=bias_B1MS, scale=scale
    )
    return out_BGMV.unflatten(2, (-1, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def recomputed(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Return `function(*arguments)`, keeping only the arguments for the backward pass and not what lies between."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _attend_row(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_T: Tensor, scale: float, start: int | None
) -> Tensor:
    if start is not None:
        return _attend_from(q_BTHK, k_BSGK, v_BSGV, scale, start)
    return _attend_masked(q_BTHK, k_BSGK, v_BSGV, positions_T, scale)


def _attend_from(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, start: int) -> Tensor:
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    k_BGSK, v_BGSV = k_BSGK[:, : start + T].transpose(1, 2), v_BSGV[:, : start + T].transpose(1, 2)
    if T == 1:
        # a group's heads as rows of one product: keys and values are read once a group instead of once a head
        q_BGHK = q_BTHK.reshape(B, G, H // G, K)
        return scaled_dot_product_attention(q_BGHK, k_BGSK, v_BGSV, scale=scale).reshape(B, 1, H, -1)
    if start == 0:
        out_BHTV = scaled_dot_product_attention(
            q_BTHK.transpose(1, 2), k_BGSK, v_BGSV, is_causal=True, scale=scale, enable_gqa=G != H
        )
        return out_BHTV.transpose(1, 2)
    positions_T = torch.arange(start, start + T, device=q_BTHK.device)
    return _attend_masked(q_BTHK, k_BSGK, v_BSGV, positions_T, scale)


def _attend_masked(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_T: Tensor, scale: float) -> Tensor:
    tile = max(1, min(TILE_QUERIES, MASK_ELEMENTS // (int(positions_T.max()) + 1)))
    parts = [
        recomputed(_attend_tile, q_BCHK, k_BSGK, v_BSGV, positions_C, scale)
        for q_BCHK, positions_C in zip(q_BTHK.split(tile, dim=1), positions_T.split(tile), strict=True)
    ]
    return torch.cat(parts, dim=1)


def _attend_tile(q_BCHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_C: Tensor, scale: float) -> Tensor:
    S = int(positions_C.max()) + 1
    first = int(positions_C.min()) + 1
    bias_CS = q_BCHK.new_zeros(len(positions_C), S)
    # only keys after the tile's first query are hidden from any
    later_CS = torch.arange(first, S, device=q_BCHK.device) > positions_C[:, None]
    bias_CS[:, first:].masked_fill_(later_CS, -torch.inf)
    out_BHCV = scaled_dot_product_attention(
        q_BCHK.transpose(1, 2),
        k_BSGK[:, :S].transpose(1, 2),
        v_BSGV[:, :S].transpose(1, 2),
        attn_mask=bias_CS[None, None],
        scale=scale,
        enable_gqa=k_BSGK.shape[2] != q_BCHK.shape[2],
    )
    return out_BHCV.transpose(1, 2)
