"""Attention over chosen blocks in C++, queries of short contexts reading everything; `native/attention.cpp`."""

import torch
from torch import Tensor

from sala.ops.dense.cpu import run
from sala.ops.infllm.cpu.select import select
from sala.ops.infllm.geometry import SparseGeometry
from sala.ops.native import Function, operator

# queries whose blocks are chosen and then read: their tables are all that grows, and stay small
QUERIES = 4096

_SPARSE_STEP = Function("sala_sparse_step", "pi iii pp")


@torch.no_grad()
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
    page_table_BP: Tensor | None = None,
) -> Tensor:
    """Return (B, T, H, V) in v's dtype; see `infllm_attention`."""
    B, T = q_BTHK.shape[:2]
    if not B * T:
        return v_BSGV.new_empty(B, T, q_BTHK.shape[2], v_BSGV.shape[3])
    if start is not None:
        positions_BT = torch.arange(start, start + T).expand(B, T)
        first_sparse_B = torch.full((B,), geometry.first_sparse_position(start + T - 1))
    else:
        assert positions_BT is not None
        if T == 1 and positions_BT.dtype == torch.int64 and positions_BT.is_contiguous():
            return _step(q_BTHK, k_BSGK, v_BSGV, k1_BNGK, k2_BNGK, positions_BT, geometry, scale, page_table_BP)
        first_sparse_B = _first_sparse(positions_BT, geometry)
    parts = []
    for q_BCHK, positions_BC in zip(q_BTHK.split(QUERIES, 1), positions_BT.split(QUERIES, 1), strict=True):
        # what reads everything chooses nothing
        choosing_BC = positions_BC.masked_fill(positions_BC < first_sparse_B[:, None], -1)
        table_BCGN = select(
            q_BCHK, k1_BNGK, k2_BNGK, choosing_BC, geometry, scale, page_table_BP, page_size=k_BSGK.shape[1]
        )
        block_size = geometry.block_size
        parts.append(
            attend_blocks(
                q_BCHK, k_BSGK, v_BSGV, positions_BC, table_BCGN, first_sparse_B, page_table_BP, block_size, scale
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _step(
    q_B1HK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    k1_BNGK: Tensor,
    k2_BNGK: Tensor,
    positions_B1: Tensor,
    geometry: SparseGeometry,
    scale: float,
    page_table_BP: Tensor | None,
) -> Tensor:
    """Return the same for each row's last token; nothing but the library looks at positions."""
    first_sparse_B, choosing_B1 = sparse_step(
        positions_B1,
        geometry.dense_rule == "position",
        geometry.dense_len,
        geometry.num_selected * geometry.block_size,
    )
    table_B1GN = select(
        q_B1HK, k1_BNGK, k2_BNGK, choosing_B1, geometry, scale, page_table_BP, page_size=k_BSGK.shape[1]
    )
    block_size = geometry.block_size
    return attend_blocks(
        q_B1HK, k_BSGK, v_BSGV, positions_B1, table_B1GN, first_sparse_B, page_table_BP, block_size, scale
    )


@operator(
    "sparse_step(Tensor positions, bool by_position, int dense_len, int all_fit) -> (Tensor, Tensor)",
    lambda positions_B1, *_: (positions_B1.new_empty(positions_B1.shape[0]), torch.empty_like(positions_B1)),
)
def sparse_step(positions_B1: Tensor, by_position: bool, dense_len: int, all_fit: int) -> tuple[Tensor, Tensor]:
    """Return each row's first sparse position (B,), and the positions with -1 where everything is read."""
    first_sparse_B, choosing_B1 = positions_B1.new_empty(positions_B1.shape[0]), torch.empty_like(positions_B1)
    _SPARSE_STEP(
        positions_B1.data_ptr(), positions_B1.shape[0], by_position, dense_len, all_fit,
        first_sparse_B.data_ptr(), choosing_B1.data_ptr(),
    )  # fmt: skip
    return first_sparse_B, choosing_B1


# it looks at data, which no compiler could trace
@torch.compiler.disable
def _first_sparse(positions_BT: Tensor, geometry: SparseGeometry) -> Tensor:
    return torch.tensor([geometry.first_sparse_position(last) for last in positions_BT.amax(1).tolist()])


def _empty(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, *_: object) -> Tensor:
    return v_BSGV.new_empty(*q_BTHK.shape[:3], v_BSGV.shape[3])


@operator(
    "attend_blocks(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor table, Tensor first_sparse, "
    "Tensor? page_table, int block_size, float scale) -> Tensor",
    _empty,
)
def attend_blocks(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    positions_BT: Tensor,
    table_BTGN: Tensor,
    first_sparse_B: Tensor,
    page_table_BP: Tensor | None,
    block_size: int,
    scale: float,
) -> Tensor:
    """Return (B, T, H, V): the query at position p reads the keys 0..p of its blocks.

    Args:
        positions_BT: integer positions; negative is padding, whose output is zero.
        table_BTGN: (B, T, G, N) int32 blocks, ascending, -1 at the end.
        first_sparse_B: (B,) int64: queries at lower positions read all keys, whatever the table holds.
        page_table_BP: (B, P) int32, where `k` and `v` are pages of whole blocks.
        block_size: keys in a block.
        scale: factor on the scores.
    """
    return run(q_BTHK, k_BSGK, v_BSGV, positions_BT, 0, scale, table_BTGN, first_sparse_B, block_size, page_table_BP)
