"""InfLLM-V2 block-sparse attention: compress keys, score windows, select blocks, attend (arXiv 2509.24663).

The algorithm is that of the released MiniCPM-SALA, with these decisions written down:

- Scores are summed over a group's heads in float32 (the released kernel stores the sum in bfloat16).
- Equal scores: the lower block index wins. Ties are common, for neighbouring blocks share a window.
- Blocks after the query's own never compete, and blocks that must be read are never dropped.
- The coarse normaliser of a query that sees a window but no coarse window yet is the exact one.
- A block no visible window overlaps scores 0.
- The choice of blocks is a constant of the backward pass: no gradient flows through scores or compressed keys.
"""

import torch
from torch import Tensor

from sala.errors import InputError
from sala.ops.checks import check_devices, check_dtype
from sala.ops.dense import check_attention, dense_attention
from sala.ops.dispatch import choose, takes
from sala.ops.infllm.geometry import SparseGeometry, Windows, num_windows
from sala.ops.pages import (
    check_pages,
    check_window_pages,
    in_order,
    last_positions,
    rows_of_pages,
    windows_in_order,
)

__all__ = ["SparseGeometry", "Windows", "compress", "infllm_attention", "num_windows", "select_blocks"]


@torch.no_grad()
def compress(k_BSGK: Tensor, size: int, stride: int) -> Tensor:
    """Return the means of the complete windows of keys, tokens [stride * j, stride * j + size).

    Summed in float32, stored in the keys' dtype, and detached: compressed keys only choose blocks.

    Args:
        k_BSGK: (B, S, G, K) keys of tokens 0..S-1; or of tokens stride * j.., for windows j and later.
        size: tokens in a window.
        stride: tokens from one window's start to the next.

    Returns:
        (B, N, G, K) with N = max(0, (S - size) // stride + 1).

    Raises:
        InputError: not four dimensions, not floating point, or `size` or `stride` below 1.
    """
    if k_BSGK.ndim != 4:
        raise InputError(f"keys must have the four dimensions (B, S, G, K), not the shape {tuple(k_BSGK.shape)}")
    if size < 1 or stride < 1:
        raise InputError(f"a window's size and stride must be at least 1, not {size} and {stride}")
    check_dtype("keys", k_BSGK)
    return choose("infllm", tensors=(k_BSGK,)).compress(k_BSGK, size, stride)


def select_blocks(
    q_BTHK: Tensor,
    k1_BNGK: Tensor,
    k2_BNGK: Tensor,
    positions_BT: Tensor,
    geometry: SparseGeometry,
    *,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """Return the blocks each query reads, one set for each of its groups of heads (arXiv 2509.24663, section 3).

    Args:
        q_BTHK: (B, T, H, K) queries; head h belongs to group h // (H / G).
        k1_BNGK: (B, N, G, K) means of windows, at least those that the last position sees.
        k2_BNGK: (B, N', G, K) means of coarse windows, likewise; unused by the exact normaliser.
        positions_BT: (B, T) integer positions of the queries; negative is padding.
        geometry: windows, blocks and how many are read.
        scale: factor on the scores, K**-0.5 in the released model.
        backend: a name in `sala.ops.dispatch.BACKENDS["infllm"]`, or "auto".

    Returns:
        (B, T, G, num_selected) int32 block indices in ascending order, -1 at the end where fewer blocks exist.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or too few windows.
        BackendError: no backend of that name.
    """
    if q_BTHK.ndim != 4 or k1_BNGK.ndim != 4:
        raise InputError(
            f"queries and compressed keys must have four dimensions, not the shapes "
            f"{tuple(q_BTHK.shape)} and {tuple(k1_BNGK.shape)}"
        )
    B, T, H, _ = q_BTHK.shape
    G = k1_BNGK.shape[2]
    if G < 1 or H % G:
        raise InputError(f"{H} query heads cannot share {G} key heads: the first must be a multiple of the second")
    check_dtype("queries", q_BTHK)
    check_devices(queries=q_BTHK, positions=positions_BT)
    _check_positions(positions_BT, B, T)
    last_position = int(positions_BT.max()) if positions_BT.numel() else -1
    _check_windows(k1_BNGK, k2_BNGK, q_BTHK, G, last_position, geometry)
    # the choice of blocks has no gradient, whatever its inputs have
    q_BTHK, k1_BNGK, k2_BNGK = q_BTHK.detach(), k1_BNGK.detach(), k2_BNGK.detach()
    implementation = choose("infllm", backend, (q_BTHK, k1_BNGK, k2_BNGK, positions_BT))
    if not B * T * H:
        return q_BTHK.new_full((B, T, G, geometry.num_selected), -1, dtype=torch.int32)
    return implementation.select(q_BTHK, k1_BNGK, k2_BNGK, positions_BT, geometry, scale)


def infllm_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    k1_BNGK: Tensor | None,
    k2_BNGK: Tensor | None,
    positions_BT: Tensor | None,
    geometry: SparseGeometry,
    *,
    scale: float,
    start: int | None = None,
    static: bool = False,
    page_table_BP: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return attention over the blocks each query selects, or over everything where its context is short.

    The key at index s has position s; the query at position p sees keys 0..p of the blocks it selected. Below
    `geometry.dense_len`, by `geometry.dense_rule`, and while all blocks fit into the selection, it sees all keys 0..p.
    Differentiable through q, k and v.

    Args:
        q_BTHK: (B, T, H, K) queries; head h reads key head h // (H / G).
        k_BSGK: (B, S, G, K) keys of positions 0..S-1. What lies beyond a row's last position is not read.
        v_BSGV: (B, S, G, V) values.
        k1_BNGK: (B, N, G, K) means of windows, at least those that the last position sees; None: made here from `k`.
        k2_BNGK: (B, N', G, K) means of coarse windows, likewise.
        positions_BT: (B, T) integer positions of the queries, rows may differ; negative is padding, whose output is
            zero. May be None when `start` is given.
        geometry: windows, blocks, how many are read, and from which length on.
        scale: factor on the scores, K**-0.5 in the released model.
        start: given when every row's queries are at start..start+T-1: then `positions_BT` is not looked at, and a call
            that is dense as a whole has no step that depends on data.
        static: for queries whose positions only the device knows: what runs depends on shapes alone, as in a CUDA
            graph, with `backend` "triton"; the others look at the positions. That every position has its key and every
            window up to it its mean is taken for granted, and keys beyond must be numbers.
        page_table_BP: (B, max_pages) int32: then `k` and `v` are pages, (num_pages, page_size, G, width), of whole
            blocks, and the key at position p of row b is `k[page_table[b, p // page_size], p % page_size]`. Rows may
            share pages; entries beyond a row's last position may be anything. `k1` and `k2` are pages too,
            (num_pages, page_size // stride, G, K), each window in the page of its last token (`sala.ops.pages`). For
            backends without the feature "pages", for gradients, and where compressed keys are left out, all are copied
            into rows.
        backend: a name in `sala.ops.dispatch.BACKENDS["infllm"]`, or "auto".

    Returns:
        (B, T, H, V) in v's dtype.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, a position without a key, too few windows, or a page that
            does not exist (not looked for with `static`, nor on a device with `start`).
        BackendError: no backend of that name.
    """
    k_rows, v_rows = k_BSGK, v_BSGV
    if page_table_BP is not None:
        k_rows, v_rows = rows_of_pages(k_BSGK, v_BSGV, page_table_BP, geometry.block_size)
    check_attention(q_BTHK, k_rows, v_rows, positions_BT, start, static)
    B, T, H, _ = q_BTHK.shape
    if static:
        last_position = k_rows.shape[1] - 1
    elif start is not None:
        last_position = start + T - 1
    else:
        assert positions_BT is not None
        last_position = int(positions_BT.max()) if positions_BT.numel() else -1
    k1_BNGK, k2_BNGK = (None if x is None else x.detach() for x in (k1_BNGK, k2_BNGK))
    implementation = choose("infllm", backend, (q_BTHK, k_BSGK, v_BSGV, k1_BNGK, k2_BNGK, positions_BT))
    if not B * T * H * v_BSGV.shape[3]:
        return v_BSGV.new_zeros(B, T, H, v_BSGV.shape[3])
    if page_table_BP is not None:
        for keys, stride, name in (
            (k1_BNGK, geometry.kernel_stride, "compressed keys"),
            (k2_BNGK, geometry.coarse_stride, "coarse compressed keys"),
        ):
            if keys is not None:
                check_window_pages(keys, k_BSGK, stride, name)
        last_B = last_positions(page_table_BP, positions_BT, start, last_position + 1 if static else T)
        if not static:
            check_pages(page_table_BP, last_B, k_BSGK, start)
        wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTHK, k_BSGK, v_BSGV))
        compressed = k1_BNGK is not None and k2_BNGK is not None
        if not takes("infllm", implementation, "pages") or not compressed or wants_gradient:
            k_BSGK, v_BSGV = (in_order(x, page_table_BP, last_B) for x in (k_BSGK, v_BSGV))
            if k1_BNGK is not None:
                k1_BNGK = windows_in_order(k1_BNGK, page_table_BP, geometry.kernel_size, geometry.kernel_stride)
            if k2_BNGK is not None:
                k2_BNGK = windows_in_order(k2_BNGK, page_table_BP, geometry.coarse_size, geometry.coarse_stride)
            page_table_BP = None
    is_dense = last_position < geometry.first_sparse_position(last_position)
    if static and torch.compiler.is_exporting():
        if not is_dense:
            raise InputError(
                f"{k_rows.shape[1]} tokens with a mask cannot be exported: which blocks are read depends on the mask; "
                f"expected no mask, or fewer than {geometry.first_sparse_position(last_position) + 1} tokens"
            )
        return dense_attention(q_BTHK, k_BSGK, v_BSGV, positions_BT, scale=scale, static=True)
    # of a static call a later position may be sparse
    is_dense = is_dense and not static
    # on a GPU torch's own kernels are those of full attention, and read no pages
    dense_backend = "eager" if backend == "triton" else backend
    if (
        is_dense
        and backend != "reference"
        and (page_table_BP is None or takes("dense", choose("dense", dense_backend, (q_BTHK, k_BSGK, v_BSGV)), "pages"))
    ):
        return dense_attention(
            q_BTHK,
            k_BSGK,
            v_BSGV,
            positions_BT,
            scale=scale,
            start=start,
            page_table_BP=page_table_BP,
            backend=dense_backend,
        )
    if k1_BNGK is None:
        k1_BNGK = compress(k_BSGK, geometry.kernel_size, geometry.kernel_stride)
    if k2_BNGK is None:
        k2_BNGK = compress(k_BSGK, geometry.coarse_size, geometry.coarse_stride)
    tensors = (q_BTHK, k_BSGK, v_BSGV, k1_BNGK, k2_BNGK, positions_BT)
    if page_table_BP is not None:
        return implementation.attend(*tensors, geometry, scale, start, page_table_BP=page_table_BP)
    _check_windows(k1_BNGK, k2_BNGK, q_BTHK, k_BSGK.shape[2], last_position, geometry)
    return implementation.attend(*tensors, geometry, scale, start)


def _check_positions(positions_BT: Tensor, B: int, T: int) -> None:
    if positions_BT.shape != (B, T) or positions_BT.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"positions must be int32 or int64 of shape {(B, T)}, not {positions_BT.dtype} of shape "
            f"{tuple(positions_BT.shape)}"
        )


def _check_windows(
    k1_BNGK: Tensor, k2_BNGK: Tensor, q_BTHK: Tensor, G: int, last_position: int, geometry: SparseGeometry
) -> None:
    check_devices(queries=q_BTHK, **{"compressed keys": k1_BNGK, "coarse compressed keys": k2_BNGK})
    sizes = (q_BTHK.shape[0], G, q_BTHK.shape[3])
    tiers = [(k1_BNGK, geometry.kernel_size, geometry.kernel_stride, "compressed keys")]
    if geometry.normalizer == "coarse":
        tiers.append((k2_BNGK, geometry.coarse_size, geometry.coarse_stride, "coarse compressed keys"))
    for keys, size, stride, name in tiers:
        check_dtype(name, keys)
        if keys.ndim != 4 or (keys.shape[0], *keys.shape[2:]) != sizes:
            raise InputError(f"{name} must have the shape (B, N, G, K) with B, G, K = {sizes}, not {tuple(keys.shape)}")
        needed = num_windows(last_position + 1, size, stride)
        if keys.shape[1] < needed:
            raise InputError(f"{name} hold {keys.shape[1]} windows; position {last_position} sees {needed}")
