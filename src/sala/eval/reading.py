"""Reading a long document through a cache, a chunk at a time; logits only where something is asked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sala.errors import InputError
from sala.model import SalaCache, new_cache

CHUNK_SIZE = 2048


@torch.no_grad()
def logits_at(
    model: Any,
    tokens_T: Tensor,
    indices_N: Tensor,
    *,
    chunk_size: int | None = CHUNK_SIZE,
    cache: SalaCache | None = None,
    on_chunk: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Return the logits (N, X) after the tokens at `indices_N`, float32; no others are ever computed.

    Args:
        model: called as `model(input_ids, cache=, use_cache=, logits_to_keep=)`, with a `config` that
            `new_cache` takes.
        tokens_T: (T,) int64, appended to what `cache` holds.
        indices_N: (N,) int64, ascending, into `tokens_T`.
        chunk_size: tokens in one call; None: all in one call without a cache, for a model whose layers are for now not
            those of its configuration.
        cache: continued and left at the end of `tokens_T`; a new one when None.
        on_chunk: called with (tokens read, T) after each chunk.

    Raises:
        InputError: no tokens, a chunk below 1, or indices that are not ascending or not among the tokens.
    """
    length = len(tokens_T)
    if length == 0 or (chunk_size is not None and chunk_size < 1):
        raise InputError(f"{length} tokens in chunks of {chunk_size}; both must be at least 1")
    if len(indices_N) and (
        int(indices_N[0]) < 0 or int(indices_N[-1]) >= length or bool((indices_N.diff() <= 0).any())
    ):
        raise InputError(f"indices {indices_N.tolist()} must be ascending and below the number of tokens, {length}")
    if chunk_size is None:
        assert cache is None, "a cache is continued in chunks"
        return model(input_ids=tokens_T[None], use_cache=False, logits_to_keep=indices_N).logits[0]
    cache = new_cache(model.config, reserve=length) if cache is None else cache
    parts = []
    for start in range(0, length, chunk_size):
        end = min(start + chunk_size, length)
        kept = indices_N[(indices_N >= start) & (indices_N < end)] - start
        output = model(input_ids=tokens_T[None, start:end], cache=cache, use_cache=True, logits_to_keep=kept)
        parts.append(output.logits[0])
        on_chunk(end, length)
    return torch.cat(parts)
