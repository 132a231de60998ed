"""Block selection in C++: scores in panels that stay in the cache, chosen by a threshold on their bits."""

import ctypes

import torch
from torch import Tensor

from sala.ops import native
from sala.ops.infllm.geometry import Numbers, SparseGeometry

_TYPES = "ppppppp f i"
_select = {
    torch.float32: native.Function("sala_select_f32", _TYPES),
    torch.bfloat16: native.Function("sala_select_bf16", _TYPES),
}


def select(
    q_BTHK: Tensor,
    k1_BNGK: Tensor,
    k2_BNGK: Tensor,
    positions_BT: Tensor,
    geometry: SparseGeometry,
    scale: float,
    page_table_BP: Tensor | None = None,
    page_size: int = 1,
) -> Tensor:
    """Return (B, T, G, num_selected) int32 block indices, ascending, -1 at the end; see `select_blocks`.

    page_table_BP, page_size: (B, P) int32, where compressed keys lie in pages of so many tokens; see `sala.ops.pages`.
    """
    exact = geometry.normalizer == "exact"
    return _operator(
        q_BTHK,
        k1_BNGK,
        k1_BNGK if exact else k2_BNGK,
        positions_BT,
        page_table_BP,
        page_size,
        geometry.numbers,
        scale,
    )


def _table(
    q_BTHK: Tensor,
    k1_BNGK: Tensor,
    k2_BNGK: Tensor,
    positions_BT: Tensor,
    page_table_BP: Tensor | None,
    page_size: int,
    geometry: list[int],
    scale: float,
) -> Tensor:
    B, T = q_BTHK.shape[:2]
    return q_BTHK.new_empty((B, T, k1_BNGK.shape[2], Numbers(*geometry).num_selected), dtype=torch.int32)


@native.operator(
    "infllm_select(Tensor q, Tensor k1, Tensor k2, Tensor positions, Tensor? page_table, int page_size, int[] geometry, "
    "float scale) -> Tensor",
    _table,
)
def _operator(
    q_BTHK: Tensor,
    k1_BNGK: Tensor,
    k2_BNGK: Tensor,
    positions_BT: Tensor,
    page_table_BP: Tensor | None,
    page_size: int,
    geometry: list[int],
    scale: float,
) -> Tensor:
    # keys may be kept in another dtype than queries: float32 holds both
    dtype = q_BTHK.dtype if q_BTHK.dtype == k1_BNGK.dtype == k2_BNGK.dtype else torch.float32
    q, k1, k2 = (
        x if x.dtype == dtype and x.stride(-1) == 1 else x.to(dtype).contiguous() for x in (q_BTHK, k1_BNGK, k2_BNGK)
    )
    positions = positions_BT.to(torch.int64).contiguous()
    table = _table(q, k1, k2, positions, page_table_BP, page_size, geometry, scale)
    pages = None if page_table_BP is None else page_table_BP.contiguous()
    pages_at, num_pages = (None, 0) if pages is None else (pages.data_ptr(), pages.shape[1])
    strides = (*q.stride()[:3], *k1.stride()[:3], *k2.stride()[:3])
    sizes = (*q.shape[:3], *k1.shape[2:], *strides, num_pages, page_size, *geometry)
    numbers = native.kept((ctypes.c_int64 * len(sizes))(*sizes))
    _select[dtype](
        ctypes.addressof(numbers),
        *(x.data_ptr() for x in (q, k1, k2, positions)),
        pages_at,
        table.data_ptr(),
        scale,
        torch.get_num_threads(),
    )
    return table
