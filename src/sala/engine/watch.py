"""Which blocks of a text the block-sparse layers read while an answer is written."""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from sala.model import MiniCPMSALAForCausalLM
from sala.model.attention import logits_scale
from sala.model.cache import SparseCache
from sala.model.infllm import SparseAttention
from sala.model.norm import normed_or_fused
from sala.ops.infllm import select_blocks
from sala.ops.pointwise import norm_rotate


class Watch:
    """Inside `with`, counts what the last query of each call chooses in each block-sparse layer.

    Blocks that every query reads (the first ones and the window) do not count: they were not chosen. The selection is
    computed once more, from the layer's own input and compressed keys. Rows are single and read through a cache.
    """

    def __init__(self, model: MiniCPMSALAForCausalLM):
        self._layers = [module for module in model.modules() if isinstance(module, SparseAttention)]
        self._hooks: list[Any] = []
        self._counts_N: Tensor | None = None

    def __enter__(self) -> Self:
        self._hooks = [layer.register_forward_hook(self._look) for layer in self._layers]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def blocks_N(self) -> Tensor | None:
        """Return how many heads' groups chose each block, a sum over layers; None where nothing was left out."""
        return self._counts_N

    def _look(self, layer: SparseAttention, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_BTD, rows, cache = inputs
        assert rows.start is not None
        geometry, position = layer.geometry, rows.start + x_BTD.shape[1] - 1
        if position < geometry.first_sparse_position(position):
            return
        chosen = choose_again(layer, x_BTD, rows, cache, position)
        own = position // geometry.block_size
        counts_N = torch.zeros(own + 1, device=chosen.device)
        blocks = chosen[chosen >= 0].long()
        counts_N.index_add_(0, blocks, torch.ones_like(blocks, dtype=counts_N.dtype))
        counts_N[: geometry.init_blocks] = 0
        counts_N[max(0, own - geometry.local_blocks) :] = 0
        self._counts_N = counts_N if self._counts_N is None else self._counts_N + counts_N


def choose_again(layer: SparseAttention, x_BTD: Tensor, rows: Any, cache: Any, first: int) -> Tensor:
    """Return the blocks (B, T, G, N) that the queries at position `first` and later choose, -1 where there are fewer.

    What the layer chose in the call that just read `x_BTD`, computed once more from its own input and compressed keys.
    """
    assert isinstance(cache, SparseCache) and rows.start is not None
    start = max(0, first - rows.start)
    fine, coarse = (tier.filled for tier in cache.tiers)
    assert fine is not None and coarse is not None
    q_BTHK, _, _ = layer.project(x_BTD[:, start:])
    q_BTHK, norm = normed_or_fused(layer.q_norm, q_BTHK)
    rotation = None if rows.rotation is None or not layer.use_rope else tuple(t[:, start:] for t in rows.rotation)
    positions_BT = rows.positions_BT[:, start:]
    scale_BT = None if layer.logits_base is None else logits_scale(positions_BT, layer.logits_base)
    q_BTHK = norm_rotate(q_BTHK, norm=norm, rotation=rotation, scale_BT=scale_BT).to(fine.dtype)
    return select_blocks(q_BTHK, fine, coarse, positions_BT, layer.geometry, scale=layer.width**-0.5)
