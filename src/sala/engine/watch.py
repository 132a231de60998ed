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
from sala.model.paged import SparsePool
from sala.model.rows import Pages
from sala.ops.infllm import select_blocks
from sala.ops.pages import windows_in_order
from sala.ops.pointwise import norm_rotate


class Watch:
    """Inside `with`, sums the attention that the last query of each call gives to blocks that it chose.

    Blocks that every query reads (the first ones and the window) do not count: they were not chosen. Selection and weights
    are computed once more, from the layer's own input and cache. Rows are single and of requests, in pages.
    """

    def __init__(self, model: MiniCPMSALAForCausalLM):
        self._layers = [module for module in model.modules() if isinstance(module, SparseAttention)]
        self._hooks: list[Any] = []
        self._weights_N: Tensor | None = None

    def __enter__(self) -> Self:
        self._hooks = [layer.register_forward_hook(self._look) for layer in self._layers]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def blocks_N(self) -> Tensor | None:
        """Return the attention that went to each block, a sum over heads and layers; None where all blocks are read."""
        return self._weights_N

    def _look(self, layer: SparseAttention, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_BTD, rows, cache = inputs
        assert rows.start is not None
        geometry, position = layer.geometry, rows.start + x_BTD.shape[1] - 1
        if position < geometry.first_sparse_position(position):
            return
        assert isinstance(cache, SparsePool) and isinstance(rows.layout, Pages)
        table_1P = rows.layout.table_BP
        fine, coarse = (
            windows_in_order(tier.like(x_BTD), table_1P, *tier_of)
            for tier, tier_of in zip(cache.tiers, cache.windows.tiers, strict=True)
        )
        q_BTHK, positions_BT = _queries_again(layer, x_BTD, rows, position)
        chosen = select_blocks(q_BTHK, fine, coarse, positions_BT, geometry, scale=layer.width**-0.5)
        k_NPGK = cache.keys.like(x_BTD)
        weights_N = _weights(q_BTHK[0, 0], k_NPGK, table_1P[0], chosen[0, 0], position, geometry.block_size)
        own = position // geometry.block_size
        weights_N[: geometry.init_blocks] = 0
        weights_N[max(0, own - geometry.local_blocks) :] = 0
        self._weights_N = weights_N if self._weights_N is None else self._weights_N + weights_N


def choose_again(layer: SparseAttention, x_BTD: Tensor, rows: Any, cache: Any, first: int) -> Tensor:
    """Return the blocks (B, T, G, N) that the queries at position `first` and later choose, -1 where there are fewer.

    What the layer chose in the call that just read `x_BTD`, computed once more from its own input and compressed keys.
    """
    assert isinstance(cache, SparseCache)
    fine, coarse = (tier.filled for tier in cache.tiers)
    assert fine is not None and coarse is not None
    q_BTHK, positions_BT = _queries_again(layer, x_BTD, rows, first)
    return select_blocks(q_BTHK, fine, coarse, positions_BT, layer.geometry, scale=layer.width**-0.5)


def _queries_again(layer: SparseAttention, x_BTD: Tensor, rows: Any, first: int) -> tuple[Tensor, Tensor]:
    """Return the queries (B, T, H, K) at position `first` and later, and their positions (B, T)."""
    assert rows.start is not None
    start = max(0, first - rows.start)
    q_BTHK, _, v_BTGV = layer.project(x_BTD[:, start:])
    q_BTHK, norm = normed_or_fused(layer.q_norm, q_BTHK)
    rotation = None if rows.rotation is None or not layer.use_rope else tuple(t[:, start:] for t in rows.rotation)
    positions_BT = rows.positions_BT[:, start:]
    scale_BT = None if layer.logits_base is None else logits_scale(positions_BT, layer.logits_base)
    return norm_rotate(q_BTHK, norm=norm, rotation=rotation, scale_BT=scale_BT).to(v_BTGV.dtype), positions_BT


def _weights(
    q_HK: Tensor, k_NPGK: Tensor, table_P: Tensor, chosen_GN: Tensor, position: int, block_size: int
) -> Tensor:
    """Return the attention weights (blocks,) float32 of the query at `position`, summed over heads and a block's keys."""
    page, groups, width = k_NPGK.shape[1:]
    weights_N = torch.zeros(position // block_size + 1, device=q_HK.device)
    for group, q_RK in enumerate(q_HK.chunk(groups)):
        blocks = chosen_GN[group][chosen_GN[group] >= 0].long()
        places = (blocks[:, None] * block_size + torch.arange(block_size, device=blocks.device)).flatten()
        places = places[places <= position]
        k_SK = k_NPGK[table_P[places // page].long(), places % page, group]
        scores_RS = q_RK.float() @ k_SK.float().T * width**-0.5
        weights_N.index_add_(0, places // block_size, scores_RS.softmax(dim=-1).sum(dim=0))
    return weights_N
