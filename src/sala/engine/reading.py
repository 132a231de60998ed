"""Reading tokens through a cache, a chunk at a time; logits only where they are asked for."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sala.errors import InputError
from sala.model import SalaCache, new_cache
from sala.model.interface import named

DEFAULT_CHUNK = 2048


@torch.inference_mode()
def read(
    model: Any,
    ids_BT: Tensor,
    indices_N: Tensor,
    cache: SalaCache,
    *,
    chunk: int = DEFAULT_CHUNK,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Tensor]:
    """Read tokens behind what `cache` holds and yield, chunk by chunk, the logits (B, n, X) after those at `indices_N`.

    Args:
        model: called as `model(input_ids, cache=, use_cache=, logits_to_keep=)`.
        ids_BT: int64 (B, T), rows without padding, on the model's device.
        indices_N: int64 (N,) on the CPU, ascending, into `ids_BT`.
        on_tokens: called after every chunk with its number of tokens a row.

    Raises:
        InputError: no tokens, a chunk below 1, or indices that are not ascending or not among the tokens.
    """
    length = ids_BT.shape[1]
    if length == 0 or chunk < 1:
        raise InputError(f"{length} tokens in chunks of {chunk}; expected 1 or above of both (chunk = {chunk})")
    if len(indices_N) and (
        int(indices_N[0]) < 0 or int(indices_N[-1]) >= length or bool((indices_N.diff() <= 0).any())
    ):
        raise InputError(f"indices {indices_N.tolist()}; expected ascending ones below the number of tokens, {length}")
    start = 0
    for part_BC in ids_BT.split(min(chunk, length), dim=1):
        end = start + part_BC.shape[1]
        kept = indices_N[(indices_N >= start) & (indices_N < end)] - start
        output = model(part_BC, **named(cache), use_cache=True, logits_to_keep=kept.to(ids_BT.device))
        on_tokens(end - start)
        yield output.logits
        start = end


def logits_at(
    model: Any,
    tokens_T: Tensor,
    indices_N: Tensor,
    *,
    chunk: int = DEFAULT_CHUNK,
    cache: SalaCache | None = None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Return the logits (N, X) after the tokens at `indices_N` of one row (T,); see `read`. cache: a new one when None."""
    cache = new_cache(model.config, reserve=len(tokens_T)) if cache is None else cache
    parts = read(model, tokens_T[None], indices_N, cache, chunk=chunk, on_tokens=on_tokens)
    return torch.cat([logits_1NX[0] for logits_1NX in parts])
