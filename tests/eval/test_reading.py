"""Reading through a cache: logits where they are asked for, the same in chunks and at once."""

from typing import Any

import pytest
import torch

from sala.errors import InputError
from sala.eval import logits_at
from tolerances import assert_close


@pytest.mark.parametrize("chunk_size", [1, 63, 129, 500])
def test_logits_in_chunks_are_those_of_one_call(tiny_hybrid: Any, chunk_size: int) -> None:
    tokens_T = torch.arange(130) * 7 % 200
    indices_N = torch.tensor([0, 62, 63, 128, 129])
    with torch.no_grad():
        whole = tiny_hybrid(input_ids=tokens_T[None], use_cache=False).logits[0, indices_N]
    assert_close(logits_at(tiny_hybrid, tokens_T, indices_N, chunk_size=chunk_size), whole)


@pytest.mark.parametrize("indices", [[3, 3], [5, 4], [-1], [10]])
def test_indices_out_of_order_or_range_are_refused(tiny_hybrid: Any, indices: list[int]) -> None:
    with pytest.raises(InputError, match="ascending"):
        logits_at(tiny_hybrid, torch.zeros(10, dtype=torch.int64), torch.tensor(indices))
