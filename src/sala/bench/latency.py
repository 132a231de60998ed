"""Time to first token, time of a further token and memory against length, models taking turns in one process."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sala.bench.device import synchronize
from sala.bench.memory import PeakMemory, peak_memory
from sala.engine.generate import DEFAULT_CHUNK, decode, prefill
from sala.engine.sampling import Sampler, Sampling
from sala.errors import InputError
from sala.model import new_cache

DECODE_STEPS = 8


@dataclass(frozen=True, slots=True)
class LatencyPoint:
    """One model at one length; times are medians over `repeats`.

    first_token_s: from an empty cache to the first token, the whole prompt read in chunks.
    decode_s: of one further token, over all steps of all repeats.
    cache_bytes: what the cache holds after the prompt. peak_bytes: the process's peak resident memory above its size
        before the work, the largest over the repeats; None where the system does not tell.
    """

    model: str
    length: int
    repeats: int
    first_token_s: float
    first_token_each_s: tuple[float, ...]
    decode_s: float
    cache_bytes: int
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class Timing:
    """One run; `cache_bytes` is taken after the prompt."""

    first_token_s: float
    decode_each_s: tuple[float, ...]
    cache_bytes: int


def latency(
    models: Mapping[str, Any],
    tokens_T: Tensor,
    repeats: Mapping[int, int],
    *,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> list[LatencyPoint]:
    """Measure every model at every length, as often as `repeats` says for it.

    The models take turns, so that a slow spell of the machine meets all of them; each runs once at the shortest length
    before anything is timed.

    Args:
        tokens_T: (T,) int64, the prompt; the first `length` of it are read.
        on_run: called with (runs done, runs).

    Raises:
        InputError: fewer tokens than the longest length, no length, or a length without repeats.
    """
    if not repeats or min(repeats.values()) < 1 or max(repeats) > len(tokens_T):
        raise InputError(
            f"repeats {dict(repeats)} by length with {len(tokens_T)} tokens; expected at least one length, one "
            "repeat of each, and as many tokens as the longest"
        )
    for model in models.values():
        _run(model, tokens_T[: min(repeats)])
    runs: dict[tuple[int, str], list[tuple[Timing, PeakMemory]]] = {
        (length, name): [] for length in repeats for name in models
    }
    done, total = 0, sum(repeats.values()) * len(models)
    for length, times in repeats.items():
        for _ in range(times):
            for name, model in models.items():
                runs[length, name].append(_run(model, tokens_T[:length]))
                done += 1
                on_run(done, total)
    return [_point(name, length, measured) for (length, name), measured in runs.items()]


@torch.inference_mode()
def timed_answer(
    model: Any,
    cache: Any,
    tokens_T: Tensor,
    *,
    chunk: int,
    steps: int,
    cache_bytes: Callable[[Any], int],
    on_tokens: Callable[[int], None] = lambda tokens: None,
    recorded: bool = False,
) -> Timing:
    """Read a prompt into an empty cache and decode `steps` tokens, one at a time, each seen before the next is asked for.

    model: any that takes input_ids, a cache, use_cache and logits_to_keep as those of transformers do.
    on_tokens: called after every chunk of the prompt with its number of tokens.
    recorded: decode by replaying a graph, as `sala generate` does on a GPU; of models of this package. The first two of
        the steps compile and record.
    """
    T, device = len(tokens_T), tokens_T.device
    seen_1S = torch.cat((tokens_T, tokens_T.new_zeros(steps + 1)))[None]
    sampler = Sampler(Sampling(), device)
    synchronize(device)
    started = perf_counter()
    logits_1X = prefill(model, seen_1S[:, :T], cache, chunk, on_tokens)
    with closing(decode(model, cache, seen_1S, T, logits_1X, sampler, recorded)) as tokens:
        next(tokens)
        first_token_s, size = perf_counter() - started, cache_bytes(cache)
        decode_each_s = []
        for _ in range(steps):
            started = perf_counter()
            next(tokens)
            decode_each_s.append(perf_counter() - started)
    return Timing(first_token_s, tuple(decode_each_s), size)


def _point(name: str, length: int, runs: Sequence[tuple[Timing, PeakMemory]]) -> LatencyPoint:
    timings = [timing for timing, _ in runs]
    peaks = [memory.added_bytes for _, memory in runs if memory.added_bytes is not None]
    return LatencyPoint(
        model=name,
        length=length,
        repeats=len(runs),
        first_token_s=median(timing.first_token_s for timing in timings),
        first_token_each_s=tuple(timing.first_token_s for timing in timings),
        decode_s=median(seconds for timing in timings for seconds in timing.decode_each_s),
        cache_bytes=timings[0].cache_bytes,
        peak_bytes=max(peaks, default=None),
    )


def _run(model: Any, tokens_T: Tensor) -> tuple[Timing, PeakMemory]:
    with peak_memory() as memory:
        cache = new_cache(model.config, reserve=len(tokens_T) + DECODE_STEPS)
        timing = timed_answer(
            model, cache, tokens_T, chunk=DEFAULT_CHUNK, steps=DECODE_STEPS, cache_bytes=lambda cache: cache.size_bytes
        )
    return timing, memory
