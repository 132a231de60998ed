"""Causal attention over all keys, by position."""

import torch
from torch import Tensor

from sala.errors import InputError
from sala.ops.checks import check_devices, check_dtype

# imported here and not on first use: torch.compile cannot trace an import
from sala.ops.dense import eager as _eager  # noqa: F401
from sala.ops.dense.positions import common_start, row_by_row
from sala.ops.dispatch import choose, takes
from sala.ops.pages import check_pages, in_order, last_positions, rows_of_pages

__all__ = ["check_attention", "common_start", "dense_attention", "row_by_row"]


def dense_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    positions_BT: Tensor | None,
    *,
    scale: float,
    start: int | None = None,
    static: bool = False,
    page_table_BP: Tensor | None = None,
    backend: str = "auto",
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
        static: for queries whose positions only the device knows: what runs depends on shapes alone, as in a CUDA
            graph. That each has its key is taken for granted, and keys and values beyond must be numbers.
        page_table_BP: (B, max_pages) int32: then `k` and `v` are pages, (num_pages, page_size, G, width), and the key at
            position p of row b is `k[page_table[b, p // page_size], p % page_size]`. Rows may share pages; entries beyond
            a row's last position may be anything. Backends without the feature "pages" get a copy in rows.
        backend: a name in `sala.ops.dispatch.BACKENDS["dense"]`, or "auto".

    Returns:
        (B, T, H, V) in v's dtype.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, a position without a key, or a page that does not exist
            (not looked for with `static`, nor on a device with `start`).
        BackendError: no backend of that name, or it does not take these tensors.
    """
    if page_table_BP is None:
        check_attention(q_BTHK, k_BSGK, v_BSGV, positions_BT, start, static)
        implementation = choose("dense", backend, (q_BTHK, k_BSGK, v_BSGV))
    else:
        k_rows, v_rows = rows_of_pages(k_BSGK, v_BSGV, page_table_BP)
        check_attention(q_BTHK, k_rows, v_rows, positions_BT, start, static)
        last_B = last_positions(page_table_BP, positions_BT, start, k_rows.shape[1] if static else q_BTHK.shape[1])
        if not static:
            check_pages(page_table_BP, last_B, k_BSGK, start)
        implementation = choose("dense", backend, (q_BTHK, k_BSGK, v_BSGV))
        if takes("dense", implementation, "pages"):
            return implementation.attend(
                q_BTHK, k_BSGK, v_BSGV, positions_BT, scale, start, page_table_BP=page_table_BP
            )
        k_BSGK, v_BSGV = (in_order(x, page_table_BP, last_B) for x in (k_BSGK, v_BSGV))
    if static:
        return implementation.attend_static(q_BTHK, k_BSGK, v_BSGV, positions_BT, scale)
    return implementation.attend(q_BTHK, k_BSGK, v_BSGV, positions_BT, scale, start)


def check_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    positions_BT: Tensor | None,
    start: int | None,
    static: bool = False,
) -> None:
    """Check that queries, keys, values and positions fit together; with `static` without reading the positions.

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
    check_dtype("queries, keys and values", q_BTHK)
    check_devices(queries=q_BTHK, keys=k_BSGK, values=v_BSGV, positions=positions_BT)
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
    if not static and positions_BT.numel() and int(positions_BT.max()) >= S:
        raise InputError(f"a query at position {int(positions_BT.max())} needs its key, there are {S} keys")
