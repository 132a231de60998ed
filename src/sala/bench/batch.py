"""Decoding many requests at once: a step of rows of any lengths against its parts, and continuations of one prefix."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sala.bench.device import CLOCKS, HostTimer
from sala.bench.environment import environment
from sala.bench.failures import Failures
from sala.bench.shapes import hybrid_config
from sala.errors import InputError
from sala.model import MiniCPMSALAForCausalLM, PagedCache, PagedRow, new_paged_cache
from sala.model.linear import Linear
from sala.model.paged import PAGE_TOKENS, StatePool
from sala.ops.lightning import lightning_attention

# tokens that a row has room for behind its context
ROOM = 64


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What to measure: a row of each length, and so many continuations of a prefix."""

    shape: str = "sala-1b"
    lengths: tuple[int, ...] = tuple(1024 * length for length in (1, 2, 4, 8, 16, 32, 48, 64))
    continuations: int = 16
    prefix: int = 65536
    repeats: int = 9
    clock: str = "wall"
    seed: int = 0


class Bench:
    """A hybrid of random weights in bfloat16 and a paged cache, filled with random numbers in place of texts that were read."""

    def __init__(self, plan: BatchPlan):
        torch.manual_seed(plan.seed)
        self.plan, self.timer = plan, HostTimer(plan.clock)
        self.model = MiniCPMSALAForCausalLM(hybrid_config(plan.shape)).bfloat16().eval()
        self.linears = [module for module in self.model.modules() if isinstance(module, Linear)]

    def filled(self, pages: int, rows: Sequence[PagedRow]) -> PagedCache:
        cache = new_paged_cache(self.model.config, pages, 2 * len(rows))
        # memory is taken at the first writing
        self.step(cache, rows[:1])
        states = [layer.buffer for layer in cache.layers if isinstance(layer, StatePool)]
        for buffer in [*states, *(tensor.buffer for _, tensor in cache.tensors())]:
            assert buffer is not None
            buffer.normal_()
        return cache

    @torch.inference_mode()
    def step(self, cache: PagedCache, rows: Sequence[PagedRow]) -> Tensor:
        network = self.model.model
        placed = network.rotated(cache.place(rows, [1] * len(rows)))
        hidden = network.run(torch.zeros(len(rows), 1, dtype=torch.long), placed, cache.layers)
        return self.model.logits(hidden)

    @torch.inference_mode()
    def products(self, inputs: dict[int, Tensor]) -> None:
        """Multiply inputs, by their width, with every matrix of the model once."""
        for linear in self.linears:
            linear(inputs[linear.in_features])

    @torch.inference_mode()
    def attention(self, cache: PagedCache, row: PagedRow) -> None:
        """Run what the layers of one row do with its cache."""
        placed = cache.place([row], [1])
        assert placed.pages is not None
        for layer, memory in zip(self.model.model.layers, cache.layers, strict=True):
            mixer: Any = layer.self_attn
            q, k = (
                torch.zeros(1, 1, n, mixer.width, dtype=torch.bfloat16) for n in (mixer.num_heads, mixer.num_groups)
            )
            if isinstance(memory, StatePool):
                decays = torch.tensor(mixer.log_decays)
                slots_2B = placed.pages.slots_2B
                lightning_attention(q, q, q, decays, scale=1.0, initial_state_BHKV=memory.buffer, slots_2B=slots_2B)
            else:
                mixer.attend(q, k, k, placed, memory)

    def seconds(self, run: Callable[[], object]) -> tuple[float, ...]:
        run()
        return tuple(self.timer.seconds(run) for _ in range(self.plan.repeats))


def run_batch(
    plan: BatchPlan,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measure and return what `docs/benchmarks.md` describes.

    Raises:
        InputError: no such shape or clock, or numbers below one.
    """
    if min(plan.continuations, plan.prefix, plan.repeats, *plan.lengths) < 1 or plan.clock not in CLOCKS:
        raise InputError(f"numbers below one, or no clock of {', '.join(CLOCKS)}, in {asdict(plan)}")
    bench = Bench(plan)
    failures = Failures(say)
    results: dict[str, Any] = {
        "kind": "batch",
        "environment": environment(),
        "shape": plan.shape,
        "settings": asdict(plan) | {"device": "cpu", "threads": torch.get_num_threads(), "dtype": "bfloat16"},
        "failures": failures.rows,
    }
    say(f"a step of {len(plan.lengths)} rows")
    with failures.noted("batch", f"{len(plan.lengths)} rows", max(plan.lengths)):
        results["ragged"] = _ragged(bench)
    keep(results)
    say(f"{plan.continuations} continuations of {plan.prefix:,} tokens")
    with failures.noted("batch", f"{plan.continuations} continuations", plan.prefix):
        results["shared"] = _shared(bench)
    keep(results)
    return results


def _ragged(bench: Bench) -> dict[str, Any]:
    """Return a step's seconds, those of its parts, and those of each row alone."""
    lengths = bench.plan.lengths
    counts = [-(-(length + ROOM) // PAGE_TOKENS) for length in lengths]
    # pages lie anywhere
    pages = np.random.default_rng(bench.plan.seed).permutation(sum(counts)).astype(np.int32)
    own = np.split(pages, np.cumsum(counts)[:-1])
    rows = [PagedRow(own[n], length, (2 * n, 2 * n + 1)) for n, length in enumerate(lengths)]
    cache = bench.filled(len(pages), rows)
    widths = {linear.in_features for linear in bench.linears}
    inputs = {width: torch.randn(len(rows), 1, width).bfloat16() for width in widths}
    step = bench.seconds(lambda: bench.step(cache, rows))
    products = bench.seconds(lambda: bench.products(inputs))
    attention = [bench.seconds(partial(bench.attention, cache, row)) for row in rows]
    alone = [bench.seconds(partial(bench.step, cache, [row])) for row in rows]
    parts = median(products) + sum(median(each) for each in attention)
    return {
        "step_s": median(step),
        "step_each_s": step,
        "products_s": median(products),
        "rows": [
            {"length": length, "attention_s": median(a), "alone_s": median(b)}
            for length, a, b in zip(lengths, attention, alone, strict=True)
        ],
        "times_its_parts": median(step) / parts,
        "times_faster_than_one_by_one": sum(median(each) for each in alone) / median(step),
    }


def _shared(bench: Bench) -> dict[str, Any]:
    """Return what continuations of one prefix hold, and what they would hold each on its own."""
    count, prefix = bench.plan.continuations, bench.plan.prefix // PAGE_TOKENS * PAGE_TOKENS
    shared = prefix // PAGE_TOKENS
    beginning = np.arange(shared, dtype=np.int32)
    rows = [PagedRow(np.append(beginning, np.int32(shared + n)), prefix, (2 * n, 2 * n + 1)) for n in range(count)]
    cache = bench.filled(shared + count, rows)
    step = bench.seconds(lambda: bench.step(cache, rows))
    tensors = [tensor.buffer for _, tensor in cache.tensors() if tensor.buffer is not None]
    paged = sum(buffer.numel() * buffer.element_size() for buffer in tensors)
    return {
        "continuations": count,
        "prefix": prefix,
        "step_s": median(step),
        "pages_bytes": paged,
        "pages_bytes_unshared": paged // (shared + count) * (shared + 1) * count,
        "states_bytes": cache.size_bytes - paged,
    }
