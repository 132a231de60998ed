"""Dense attention in C++: any positions, any number of heads in a group, prefill and decoding; `native/attention.cpp`."""

import torch
from torch import Tensor

from sala.ops.native import Function, operator

_attention = Function("sala_attention", "i pppp ppp pii iiiiii iiiiiiiii iii f i")


def attend(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    positions_BT: Tensor | None,
    scale: float,
    start: int | None,
    page_table_BP: Tensor | None = None,
) -> Tensor:
    """Return (B, T, H, V) in v's dtype; see `dense_attention`."""
    if start is not None:
        positions_BT = None
    return _dense(q_BTHK, k_BSGK, v_BSGV, positions_BT, start or 0, scale, page_table_BP)


def attend_static(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_BT: Tensor, scale: float) -> Tensor:
    """Return (B, T, H, V); see `dense_attention`. The kernel itself looks at the positions."""
    return _dense(q_BTHK, k_BSGK, v_BSGV, positions_BT, 0, scale, None)


def _empty_like(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *_: object) -> Tensor:
    return v_BSGV.new_empty(*q_BTHK.shape[:3], v_BSGV.shape[3])


@operator(
    "dense_attention(Tensor q, Tensor k, Tensor v, Tensor? positions, SymInt start, float scale, Tensor? page_table) -> Tensor",
    _empty_like,
)
def _dense(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    positions_BT: Tensor | None,
    start: int,
    scale: float,
    page_table_BP: Tensor | None,
) -> Tensor:
    return run(q_BTHK, k_BSGK, v_BSGV, positions_BT, start, scale, page_table_BP=page_table_BP)


def run(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    positions_BT: Tensor | None,
    start: int,
    scale: float,
    table_BTGN: Tensor | None = None,
    first_sparse_B: Tensor | None = None,
    block_size: int = 64,
    page_table_BP: Tensor | None = None,
) -> Tensor:
    """Run the kernel, which block-sparse attention shares.

    Args:
        positions_BT: any integers; None: `start` onwards in every row.
        table_BTGN: (B, T, G, N) int32 blocks of `block_size` keys that a query of position `first_sparse_B[b]` and
            later reads, ascending, -1 at the end; None: all queries are dense.
        first_sparse_B: (B,) int64; with `table_BTGN`.
        block_size: keys in a block; without a table, the keys that a tile of queries passes over together.
        page_table_BP: (B, P) int32, where `k` and `v` are pages; whole blocks in one, if there is a table.
    """
    B, T, H, K = q_BTHK.shape
    G, V = v_BSGV.shape[2:]
    # only a row of numbers must stand together
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q_BTHK, k_BSGK, v_BSGV))
    positions = None if positions_BT is None else positions_BT.to(torch.int64).contiguous()
    table = None if table_BTGN is None else table_BTGN.contiguous()
    pages = None if page_table_BP is None else page_table_BP.contiguous()
    out_BTHV = torch.empty(B, T, H, V, dtype=v.dtype)
    _attention(
        v.dtype == torch.bfloat16,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out_BTHV.data_ptr(),
        None if positions is None else positions.data_ptr(),
        None if table is None else table.data_ptr(),
        None if first_sparse_B is None else first_sparse_B.data_ptr(),
        *((None, 0, 1) if pages is None else (pages.data_ptr(), pages.shape[1], k.shape[1])),
        *(B, T, H, G, K, V),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        start,
        0 if table is None else table.shape[3],
        block_size,
        scale,
        torch.get_num_threads(),
    )
    return out_BTHV
