"""Where queries stand: consecutive positions are the common case, rows that differ go one by one."""

from collections.abc import Callable

import torch
from torch import Tensor


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
