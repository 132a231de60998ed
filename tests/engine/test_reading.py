"""Reading through a cache: logits where they are asked for, the same in chunks and at once."""

from typing import Any

import pytest
import torch

from sala.engine import logits_at
from sala.errors import InputError
from tolerances import assert_close


@pytest.mark.parametrize("chunk_size", [1, 63, 129, 500])
def test_logits_in_chunks_are_those_of_one_call(model: Any, chunk_size: int) -> None:
    tokens_T = torch.arange(130) * 7 % 200
    indices_N = torch.tensor([0, 62, 63, 128, 129])
    with torch.no_grad():
        whole = model(input_ids=tokens_T[None], use_cache=False).logits[0, indices_N]
    assert_close(logits_at(model, tokens_T, indices_N, chunk=chunk_size), whole)


@pytest.mark.parametrize("indices", [[3, 3], [5, 4], [-1], [10]])
def test_indices_out_of_order_or_range_are_refused(model: Any, indices: list[int]) -> None:
    with pytest.raises(InputError, match="ascending"):
        logits_at(model, torch.zeros(10, dtype=torch.int64), torch.tensor(indices))
