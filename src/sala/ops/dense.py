"""Causal attention over all keys, by position, through torch's scaled_dot_product_attention."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from sala.errors import InputError

# elements in the mask of one tile of queries: the most that is ever built, at any length
MASK_ELEMENTS = 2**23
# more queries a tile than this gain no speed
TILE_QUERIES = 512


def dense_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    positions_BT: Tensor | None,
    *,
    scale: float,
    start: int | None = None,
) -> Tensor:
    """Return softmax attention in which the query at position p sees the keys 0..p.

    Never builds a T x S mask; differentiable. With `start` nothing depends on data, so torch.compile takes it whole.

    Args:
        q_BTHK: (B, T, H, K) queries; head h reads key head h // (H / G).
        k_BSGK: (B, S, G, K) keys of positions 0..S-1. What lies beyond a row's last position is not read.
        v_BSGV: (B, S, G, V) values.
        positions_BT: (B, T) integer positions of the queries, rows may differ; negative is padding, whose output is
            zero. May be None when `start` is given.
        scale: factor on the scores.
        start: given when every row's queries are at start..start+T-1: then `positions_BT` is not looked at.

    Returns:
        (B, T, H, V) in v's dtype.

    Raises:
        InputError: shapes or dtypes that do not fit, or a position without a key.
    """
    check_attention(q_BTHK, k_BSGK, v_BSGV, positions_BT, start)
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


def check_attention(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_BT: Tensor | None, start: int | None
) -> None:
    """Check that queries, keys, values and positions fit together.

    Raises:
        InputError: they do not; the message names the tensor and what it should be.
    """
    if q_BTHK.ndim != 4 or k_BSGK.ndim != 4 or v_BSGV.ndim != 4:
        raise InputError(
            f"queries, keys and values must have four dimensions, not the shapes "
            f"{tuple(q_BTHK.shape)}, {tuple(k_BSGK.shape)}, {tuple(v_BSGV.shape)}"
        )
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if k_BSGK.shape != (B, S, G, K) or v_BSGV.shape[:3] != (B, S, G):
        raise InputError(
            f"keys {tuple(k_BSGK.shape)} and values {tuple(v_BSGV.shape)} do not fit queries {tuple(q_BTHK.shape)}: "
            "they must be (B, S, G, K), (B, S, G, V) and (B, T, H, K)"
        )
    if G == 0 or H % G:
        raise InputError(f"{H} query heads cannot share {G} key heads: the first must be a multiple of the second")
    if not q_BTHK.dtype == k_BSGK.dtype == v_BSGV.dtype:
        raise InputError(
            f"queries, keys and values must have one dtype, not {q_BTHK.dtype}, {k_BSGK.dtype}, {v_BSGV.dtype}"
        )
    if start is not None:
        if start < 0 or start + T > S:
            raise InputError(f"{T} queries from position {start} on need {start + T} keys, there are {S}")
        return
    if positions_BT is None:
        raise InputError("the queries' positions are needed: give positions or start")
    if positions_BT.shape != (B, T) or positions_BT.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"positions must be int32 or int64 of shape {(B, T)}, not {positions_BT.dtype} of shape "
            f"{tuple(positions_BT.shape)}"
        )
    if positions_BT.numel() and int(positions_BT.max()) >= S:
        raise InputError(f"a query at position {int(positions_BT.max())} needs its key, there are {S} keys")


def common_start(positions_BT: Tensor) -> int | None:
    """Return p when every row's positions are p, p + 1, ..., else None. Reads the tensor's values."""
    if not positions_BT.numel():
        return 0
    start = int(positions_BT[0, 0])
    run_T = torch.arange(start, start + positions_BT.shape[1], device=positions_BT.device)
    return start if start >= 0 and bool((positions_BT == run_T).all()) else None


def row_by_row(
    attend: Callable[[int, Tensor, Tensor, int | None], Tensor], q_BTHK: Tensor, V: int, positions_BT: Tensor
) -> Tensor:
    """Return (B, T, H, V): each row's real queries through `attend`, zero at padding.

    A row at a time reads no key that the row does not have, whatever the memory behind its end holds.

    Args:
        attend: takes the row b, its queries (1, n, H, K), their positions (n,) and their start where they are
            consecutive, and returns (1, n, H, V).
        q_BTHK: (B, T, H, K) queries.
        V: value width.
        positions_BT: (B, T) positions; negative is padding.
    """
    rows = []
    for b, positions_T in enumerate(positions_BT):
        real_n = (positions_T >= 0).nonzero().squeeze(1)
        row_THV = q_BTHK.new_zeros(*q_BTHK.shape[1:3], V)
        if len(real_n):
            positions_n = positions_T[real_n]
            out_1nHV = attend(b, q_BTHK[b : b + 1, real_n], positions_n, common_start(positions_n[None]))
            row_THV = row_THV.index_copy(0, real_n, out_1nHV[0])
        rows.append(row_THV)
    return torch.stack(rows)


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
