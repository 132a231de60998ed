"""Dense attention through torch's scaled_dot_product_attention: differentiable, on every device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from sala.ops.dense.positions import common_start, row_by_row

# elements in the mask of one tile of queries: the most that is ever built, at any length
MASK_ELEMENTS = 2**23
# more queries a tile than this gain no speed
TILE_QUERIES = 512
# torch would take cuDNN's first, which builds a plan for every new shape: prompts, documents and steps all have their own
KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


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
    if not q_BTHK.numel():
        return q_BTHK.new_zeros(*q_BTHK.shape[:3], v_BSGV.shape[3])
    S, G = k_BSGK.shape[1:3]
    tile = _tile_of(S * q_BTHK.shape[0] * (q_BTHK.shape[2] // G))
    attend_tile = _attend_step if q_BTHK.shape[1] == 1 and not torch.is_grad_enabled() else _attend_unread
    # padding reads the first key, so that its gradient is a number
    parts = [
        recomputed(attend_tile, q_BCHK, k_BSGK, v_BSGV, positions_BC, scale)
        for q_BCHK, positions_BC in zip(
            q_BTHK.split(tile, dim=1), positions_BT.clamp(min=0).split(tile, dim=1), strict=True
        )
    ]
    return torch.cat(parts, dim=1).masked_fill((positions_BT < 0)[..., None, None], 0)


def _attend_unread(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_BT: Tensor, scale: float) -> Tensor:
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    later_BTS = torch.arange(S, device=q_BTHK.device) > positions_BT[..., None]
    bias_BTS = q_BTHK.new_zeros(B, T, S).masked_fill_(later_BTS, -torch.inf)
    # a group's heads as rows of one product: keys and values are read once a group instead of once a head
    q_BGMK = q_BTHK.reshape(B, T, G, H // G, K).permute(0, 2, 3, 1, 4).reshape(B, G, -1, K)
    bias_B1MS = bias_BTS.repeat(1, H // G, 1)[:, None]
    out_BGMV = _attention(q_BGMK, k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2), attn_mask=bias_B1MS, scale=scale)
    return out_BGMV.unflatten(2, (-1, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _attend_step(q_B1HK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_B1: Tensor, scale: float) -> Tensor:
    """Return (B, 1, H, V) by two products with all scores between them, 4 H S bytes a row.

    Of torch's kernels of attention some take no mask, and the others leave all keys of a group to one program.
    """
    B, _, H, K = q_B1HK.shape
    S, G = k_BSGK.shape[1:3]
    later_BS = torch.arange(S, device=q_B1HK.device) > positions_B1
    rows = []
    # one product for all rows would copy their keys
    for b in range(B):
        # a group's heads as rows of one product: keys and values are read once a group instead of once a head
        scores_GMS = _wide_products(q_B1HK[b].reshape(G, -1, K), k_BSGK[b].permute(1, 2, 0)).mul_(scale)
        probs_GMS = scores_GMS.masked_fill_(later_BS[b], -torch.inf).softmax(-1)
        rows.append(torch.bmm(probs_GMS.to(v_BSGV.dtype), v_BSGV[b].transpose(0, 1)).view(1, H, -1))
    return torch.stack(rows)


def _wide_products(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right in float32 or wider, for scores lose too much in bfloat16."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(left.dtype, torch.float32)
    return torch.bmm(left.to(wide), right.to(wide))


def _attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, **options: Any) -> Tensor:
    """Return torch's scaled_dot_product_attention, on a GPU by the first of `KERNELS` that takes them."""
    if not q_BHTK.is_cuda:
        return scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSV, **options)
    with sdpa_kernel(KERNELS, set_priority=True):
        return scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSV, **options)


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
    parts_C = positions_T.split(_tile_of(int(positions_T.max()) + 1))
    bounds = [(int(positions_C.min()), int(positions_C.max()) + 1) for positions_C in parts_C]
    return _attend_masked(q_BTHK, k_BSGK, v_BSGV, positions_T, bounds, scale)


def _attend_from(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, scale: float, start: int) -> Tensor:
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    k_BGSK, v_BGSV = k_BSGK[:, : start + T].transpose(1, 2), v_BSGV[:, : start + T].transpose(1, 2)
    if T == 1:
        # a group's heads as rows of one product: keys and values are read once a group instead of once a head
        q_BGHK = q_BTHK.reshape(B, G, H // G, K)
        return _attention(q_BGHK, k_BGSK, v_BGSV, scale=scale).reshape(B, 1, H, -1)
    if start == 0:
        out_BHTV = _attention(q_BTHK.transpose(1, 2), k_BGSK, v_BGSV, is_causal=True, scale=scale, enable_gqa=G != H)
        return out_BHTV.transpose(1, 2)
    q_BHTK = q_BTHK.transpose(1, 2)
    if _runs_flash_attention(q_BHTK, k_BGSK, v_BGSV):
        from_the_end = causal_lower_right(T, start + T)
        out_BHTV = _attention(q_BHTK, k_BGSK, v_BGSV, attn_mask=from_the_end, scale=scale, enable_gqa=G != H)
        return out_BHTV.transpose(1, 2)
    positions_T = torch.arange(start, start + T, device=q_BTHK.device)
    tile = _tile_of(start + T)
    bounds = [(start + first, start + min(first + tile, T)) for first in range(0, T, tile)]
    return _attend_masked(q_BTHK, k_BSGK, v_BSGV, positions_T, bounds, scale)


def _runs_flash_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor) -> bool:
    """Return whether flash attention takes these: for grouped heads torch's others on a GPU make all scores."""
    return q_BHTK.is_cuda and can_use_flash_attention(
        SDPAParams(q_BHTK, k_BGSK, v_BGSV, None, 0.0, False, q_BHTK.shape[1] != k_BGSK.shape[1])
    )


def _tile_of(S: int) -> int:
    return max(1, min(TILE_QUERIES, MASK_ELEMENTS // S))


def _attend_masked(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    positions_T: Tensor,
    bounds: Sequence[tuple[int, int]],
    scale: float,
) -> Tensor:
    """Return (B, T, H, V), a tile of queries at a time; `bounds` are its lowest position and the one behind its highest."""
    tile = _tile_of(max(end for _, end in bounds))
    parts = [
        recomputed(_attend_tile, q_BCHK, k_BSGK, v_BSGV, positions_C, first, end, scale)
        for q_BCHK, positions_C, (first, end) in zip(
            q_BTHK.split(tile, dim=1), positions_T.split(tile), bounds, strict=True
        )
    ]
    return torch.cat(parts, dim=1)


def _attend_tile(
    q_BCHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_C: Tensor, lowest: int, S: int, scale: float
) -> Tensor:
    first = lowest + 1
    bias_CS = q_BCHK.new_zeros(len(positions_C), S)
    # only keys after the tile's first query are hidden from any
    later_CS = torch.arange(first, S, device=q_BCHK.device) > positions_C[:, None]
    bias_CS[:, first:].masked_fill_(later_CS, -torch.inf)
    out_BHCV = _attention(
        q_BCHK.transpose(1, 2),
        k_BSGK[:, :S].transpose(1, 2),
        v_BSGV[:, :S].transpose(1, 2),
        attn_mask=bias_CS[None, None],
        scale=scale,
        enable_gqa=k_BSGK.shape[2] != q_BCHK.shape[2],
    )
    return out_BHCV.transpose(1, 2)
