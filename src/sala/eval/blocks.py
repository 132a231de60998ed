"""Which blocks of keys the queries of sparse layers really read, looked at while a document is read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sala.engine.watch import choose_again
from sala.errors import InputError
from sala.model.cache import SparseCache
from sala.model.infllm import SparseAttention


@dataclass
class BlockCount:
    """Blocks that were read, and blocks that lie before or at the query, of the queries that were looked at.

    Each entry of a tensor is one query of one layer, as a mean over its groups of heads. chosen: the blocks (G, N) of the
    newest query by place among the block-sparse layers, -1 where there are fewer; none for a layer that read everything.
    """

    block_size: int = 0
    positions: list[Tensor] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)
    causal: list[Tensor] = field(default_factory=list)
    chosen: dict[int, Tensor] = field(default_factory=dict)

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
    hooks = [layer.register_forward_hook(partial(_look, count, index, since)) for index, layer in enumerate(layers)]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def _look(
    count: BlockCount, index: int, since: int, layer: SparseAttention, inputs: tuple[Any, ...], output: Tensor
) -> None:
    x_BTD, rows, cache = inputs
    if rows.start is None or not isinstance(cache, SparseCache):
        raise InputError("blocks are counted for rows without padding; expected them to be read through a cache")
    geometry, last = layer.geometry, rows.start + x_BTD.shape[1] - 1
    if last < since:
        return
    looked_N = torch.arange(max(rows.start, since), last + 1)
    causal_N = looked_N // geometry.block_size + 1
    read_N = causal_N.double()
    first = max(int(looked_N[0]), geometry.first_sparse_position(last))
    if first <= last:
        table_BTGN = choose_again(layer, x_BTD, rows, cache, first)
        read_N[first - int(looked_N[0]) :] = (table_BTGN >= 0).sum(-1).double().mean(dim=(0, 2)).cpu()
        count.chosen[index] = table_BTGN[0, -1].cpu()
    count.block_size = geometry.block_size
    count.positions.append(looked_N)
    count.read.append(read_N)
    count.causal.append(causal_N.double())
