"""How many blocks of keys the queries of a sparse layer really read, counted while a document is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sala.errors import InputError
from sala.model.cache import SparseCache
from sala.model.infllm import SparseAttention
from sala.model.rows import Rows
from sala.ops.infllm import select_blocks


@dataclass
class BlockCount:
    """Blocks that were read, and blocks that lie before or at the query, of the queries that were looked at.

    Each entry of a tensor is one query of one layer, as a mean over its groups of heads.
    """

    positions: list[Tensor] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)
    causal: list[Tensor] = field(default_factory=list)

    @property
    def unread(self) -> float | None:
        """The share of blocks left unread; None when no block-sparse layer ran."""
        if not self.positions:
            return None
        return float(1 - torch.cat(self.read).sum() / torch.cat(self.causal).sum())


@contextmanager
def count_blocks(model: Any, since: int = 0) -> Iterator[BlockCount]:
    """Count, inside `with`, what the block-sparse layers of `model` read for queries at position `since` and later.

    The count is of the selection that the layer's own operator makes, from the layer's own queries and compressed keys;
    a query that attends densely reads everything. Selection is computed once more for the queries that are looked at.

    Raises:
        InputError: inside `with` the model runs without a cache, or on padded rows.
    """
    count = BlockCount()
    layers = [module for module in model.modules() if isinstance(module, SparseAttention)]
    for layer in layers:
        # an attribute of the instance hides the method until it is deleted again
        object.__setattr__(layer, "attend", _counted(layer, count, since))
    try:
        yield count
    finally:
        for layer in layers:
            object.__delattr__(layer, "attend")


def _counted(layer: SparseAttention, count: BlockCount, since: int) -> Any:
    original, geometry, scale = layer.attend, layer.geometry, layer.width**-0.5

    def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGV: Tensor, rows: Rows, cache: Any) -> Tensor:
        out_BTHV = original(q_BTHK, k_BTGK, v_BTGV, rows, cache)
        if rows.start is None or not isinstance(cache, SparseCache):
            raise InputError("blocks are counted for rows without padding that are read through a cache")
        last = rows.start + q_BTHK.shape[1] - 1
        if last < since:
            return out_BTHV
        chosen_N = torch.arange(max(rows.start, since), last + 1)
        causal_N = chosen_N // geometry.block_size + 1
        fine, coarse = (tier.filled for tier in cache.tiers)
        sparse_N = chosen_N >= geometry.first_sparse_position(last)
        read_N = causal_N.double()
        if bool(sparse_N.any()):
            assert fine is not None and coarse is not None
            positions_BN = chosen_N[sparse_N].expand(len(q_BTHK), -1)
            q = q_BTHK[:, chosen_N[sparse_N] - rows.start]
            table_BTGN = select_blocks(q, fine, coarse, positions_BN, geometry, scale=scale)
            read_N[sparse_N] = (table_BTGN >= 0).sum(-1).double().mean(dim=(0, 2))
        count.positions.append(chosen_N)
        count.read.append(read_N)
        count.causal.append(causal_N.double())
        return out_BTHV

    return attend
