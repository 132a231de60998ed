"""The count of blocks that sparse layers read."""

from typing import Any

import pytest
import torch

from sala.engine import logits_at
from sala.errors import InputError
from sala.eval import count_blocks
from sala.model import with_mixers

NO_INDICES = torch.zeros(0, dtype=torch.int64)


def read(model: Any, length: int, chunk_size: int, since: int = 0) -> Any:
    tokens_T = torch.arange(length) % 50
    with count_blocks(model, since=since) as count:
        logits_at(model, tokens_T, NO_INDICES, chunk=chunk_size)
    return count


@pytest.mark.parametrize("chunk_size", [1, 63, 200])
def test_the_share_unread_is_what_the_geometry_says(tiny_hybrid: Any, chunk_size: int) -> None:
    # blocks of 8: two by score, of them one at the start, and two before the query's own; dense below 32 tokens
    count = read(tiny_hybrid, 130, chunk_size)
    causal = torch.arange(130) // 8 + 1
    kept = causal.clamp(max=4)
    torch.testing.assert_close(torch.cat(count.positions), torch.arange(130))
    torch.testing.assert_close(torch.cat(count.causal), causal.double())
    torch.testing.assert_close(torch.cat(count.read), kept.double())
    assert count.unread == pytest.approx(1 - float(kept.sum() / causal.sum()))


def test_only_queries_since_a_position_are_looked_at(tiny_hybrid: Any) -> None:
    count = read(tiny_hybrid, 130, 63, since=128)
    assert torch.cat(count.positions).tolist() == [128, 129]
    assert count.unread == pytest.approx(1 - 4 / 17)


def test_counting_changes_no_logits_and_leaves_no_trace(tiny_hybrid: Any) -> None:
    tokens_T, indices_N = torch.arange(100) % 50, torch.tensor([60, 99])
    before = logits_at(tiny_hybrid, tokens_T, indices_N)
    with count_blocks(tiny_hybrid):
        counted = logits_at(tiny_hybrid, tokens_T, indices_N)
    torch.testing.assert_close(before, counted, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in tiny_hybrid.modules())


def test_full_attention_has_nothing_to_count(tiny_hybrid: Any) -> None:
    full = with_mixers(tiny_hybrid, ["attention", "lightning-attn", "attention"])
    assert read(full, 70, 70).unread is None


def test_a_count_without_a_cache_is_refused(tiny_hybrid: Any) -> None:
    with count_blocks(tiny_hybrid), pytest.raises(InputError, match="cache"):
        tiny_hybrid(input_ids=torch.zeros(1, 40, dtype=torch.int64), use_cache=False)


def test_the_newest_querys_blocks_are_told_by_layer(tiny_hybrid: Any) -> None:
    [(layer, chosen_GN)] = read(tiny_hybrid, 130, 63).chosen.items()
    assert layer == 0
    blocks = chosen_GN[chosen_GN >= 0].tolist()
    # the first, two before the query's own, and its own
    assert {0, 14, 15, 16} >= set(blocks) - set(range(1, 14))
    assert 16 in blocks and len(blocks) == 4
