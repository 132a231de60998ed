"""A hybrid against a full-attention model of its size: first token, decoding and memory by length, taking turns."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from sala.bench.baseline import ATTENTION, Kernels, fastest_kernels
from sala.bench.ceilings import Ceilings, measure_ceilings
from sala.bench.device import free_cached, timer_of
from sala.bench.environment import environment
from sala.bench.failures import Failures
from sala.bench.latency import Timing, timed_answer
from sala.bench.length import length_label
from sala.bench.memory import MemoryCurve
from sala.bench.shapes import HYBRIDS, baseline_config, baseline_name, hybrid_config
from sala.engine.generate import DEFAULT_CHUNK
from sala.engine.graph import why_not_capturable
from sala.engine.load import find_device
from sala.engine.memory import Need, available_bytes, estimate, human_bytes
from sala.errors import InputError, nearest
from sala.model import MiniCPMSALAConfig, new_cache
from sala.model.families import config_from
from sala.model.report import num_parameters
from sala.train.flops import attention_flops

HYBRID, BASELINE = "hybrid", "baseline"
WHO = (HYBRID, BASELINE)
# prompt chunks of the probe that decides how the baseline reads
PROBE_CHUNKS = 4
SAY_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class LatencyPlan:
    """What to measure.

    only: "hybrid" or "baseline"; empty: both, in turns. device: a name of torch's, or "auto" for a GPU where there is one.
    repeats: runs of each model at each length, one where a run takes more than `once_s`. limit_s: a run that would take
    longer, judged by the operations it has more than the length before, is not made; and no run is repeated beyond it.
    """

    shape: str = "sala-100m"
    lengths: tuple[int, ...] = (1024, 4096, 16384)
    only: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    device: str = "auto"
    chunk: int = DEFAULT_CHUNK
    new_tokens: int = 16
    repeats: int = 3
    once_s: float = math.inf
    limit_s: float = 600.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Contestant:
    """A model with random weights.

    config: its numbers in our terms, for forecasts. chunk: tokens that it reads at a time, None: the whole prompt at once.
    kernels: what it runs in. why_plain: why its steps are not replayed from a recorded graph, None when they are.
    """

    who: str
    name: str
    model: Any
    config: MiniCPMSALAConfig
    parameters: int
    chunk: int | None
    empty_cache: Callable[[int], Any]
    cache_bytes: Callable[[Any], int]
    why_plain: str | None = None
    kernel: str | None = None
    kernels: Kernels = nullcontext

    @property
    def decoded_weights(self) -> int:
        """Parameters that a step reads: all but the embeddings, of which it looks up one."""
        return self.parameters - self.config.vocab_size * self.config.hidden_size

    def need(self, length: int, dtype: torch.dtype) -> Need:
        return estimate(self.config, dtype, length, self.chunk or length, self.parameters, self.model.device.type)


@dataclass(frozen=True, slots=True)
class Run:
    timing: Timing
    memory: MemoryCurve


def run_latency(
    plan: LatencyPlan,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
    available: Callable[[], int] | None = None,
) -> dict[str, Any]:
    """Measure and return what `docs/benchmarks.md` describes; what fails stands under `failures`.

    say: told what starts. keep: given the results so far after every length, for long runs.
    available: bytes that can still be taken, asked of the device when None.

    Raises:
        InputError: no such shape or contestant, numbers below one, or weights that do not fit together.
    """
    device = find_device(plan.device)
    available = available or partial(_available, device)
    _check(plan, available())
    generator = torch.Generator().manual_seed(plan.seed)
    contestants, reading = [], {}
    for who in plan.only or WHO:
        say(f"random weights of {plan.shape if who == HYBRID else baseline_name(plan.shape)}")
        contestants.append(_hybrid(plan, device) if who == HYBRID else _baseline(plan, device))
    vocabulary = min(contestant.config.vocab_size for contestant in contestants)
    tokens_T = torch.randint(vocabulary, (max(plan.lengths),), generator=generator).to(device)
    say("ceilings of this machine")
    ceilings = measure_ceilings(timer_of(device), plan.dtype)
    failures = Failures(say)
    probe = min(len(tokens_T), PROBE_CHUNKS * plan.chunk)
    for index, contestant in enumerate(contestants):
        # the first run of a process is slower; on a GPU it compiles, also what only a long prompt needs
        warm_up = probe if device.type == "cuda" else min(plan.chunk, len(tokens_T))
        contestants[index] = contestant = _warmed_up(contestant, tokens_T[:warm_up], plan, failures)
        if contestant.who == BASELINE:
            say(f"{contestant.name}: {length_label(probe)} in chunks and at once")
            reading = _reading(contestant, tokens_T[:probe], plan)
            contestants[index] = replace(contestant, chunk=plan.chunk if reading["chosen"] == "chunks" else None)
    points: list[dict[str, Any]] = []
    results = {
        "kind": "latency",
        "environment": environment(),
        "shape": plan.shape,
        "models": {
            contestant.who: {
                "name": contestant.name,
                "parameters": contestant.parameters,
                "chunk": contestant.chunk,
                "kernel": contestant.kernel,
                "decoding": contestant.why_plain or "a recorded graph",
                "config": contestant.model.config.to_diff_dict(),
            }
            for contestant in contestants
        },
        "baseline_reading": reading,
        "settings": {
            "dtype": str(plan.dtype).removeprefix("torch."),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "chunk": plan.chunk,
            "new_tokens": plan.new_tokens,
            "repeats": plan.repeats,
            "limit_s": plan.limit_s,
            "seed": plan.seed,
        },
        "ceilings": asdict(ceilings),
        "failures": failures.rows,
        "points": points,
    }
    for length in sorted(plan.lengths):
        points += _measure(contestants, tokens_T[:length], plan, points, ceilings, failures, say, available)
        keep(results)
    return results


def _available(device: torch.device) -> int:
    free_cached(device)
    return available_bytes(device)


def _check(plan: LatencyPlan, available: int) -> None:
    if plan.shape not in HYBRIDS:
        raise InputError(f"no shape {plan.shape!r}; there are {', '.join(HYBRIDS)}{nearest(plan.shape, HYBRIDS)}")
    for who in plan.only:
        if who not in WHO:
            raise InputError(f"no contestant {who!r}; there are {', '.join(WHO)}{nearest(who, WHO)}")
    if not plan.lengths or min(plan.repeats, plan.chunk, plan.new_tokens, *plan.lengths) < 1:
        raise InputError(
            f"{plan.repeats} repeats, chunks of {plan.chunk}, {plan.new_tokens} new tokens; expected at least one"
        )
    configs = {HYBRID: hybrid_config, BASELINE: lambda name: our_config(baseline_config(name))}
    weights = sum(num_parameters(configs[who](plan.shape)) for who in plan.only or WHO) * plan.dtype.itemsize
    if weights > available:
        raise InputError(
            f"the weights of {' and '.join(plan.only or WHO)} of {plan.shape} take {human_bytes(weights)}, "
            f"{human_bytes(available)} are available; expected a smaller shape, or one of them with --only"
        )


def our_config(config: Any) -> MiniCPMSALAConfig:
    """Return a source family's configuration in our terms."""
    return config_from({k: v for k, v in config.to_diff_dict().items() if k != "attn_implementation"})


def _random(config: Any, plan: LatencyPlan, device: torch.device, **options: Any) -> Any:
    """Return a model with random weights, made where it runs."""
    torch.manual_seed(plan.seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=plan.dtype, **options).eval()


def _hybrid(plan: LatencyPlan, device: torch.device) -> Contestant:
    config = hybrid_config(plan.shape)
    model = _random(config, plan, device)
    return Contestant(
        HYBRID,
        plan.shape,
        model,
        config,
        num_parameters(config),
        plan.chunk,
        lambda reserve: new_cache(config, reserve),
        lambda cache: cache.size_bytes,
        why_not_capturable(model),
    )


def _baseline(plan: LatencyPlan, device: torch.device) -> Contestant:
    config = baseline_config(plan.shape)
    model = _random(config, plan, device, attn_implementation=ATTENTION[device.type])
    ours = our_config(config)
    kernel, kernels = fastest_kernels(config, plan.dtype, device)
    return Contestant(
        BASELINE,
        baseline_name(plan.shape),
        model,
        ours,
        num_parameters(ours),
        plan.chunk,
        lambda reserve: DynamicCache(config=config),
        _dynamic_cache_bytes,
        "transformers grows its cache at every token",
        kernel,
        kernels,
    )


def _warmed_up(contestant: Contestant, tokens_T: Tensor, plan: LatencyPlan, failures: Failures) -> Contestant:
    """Run it once and return it, decoding without a recorded graph where that fails."""
    if contestant.why_plain is None:
        with failures.noted(contestant.name, "decoding by a recorded graph"):
            _run_once(contestant, tokens_T, plan)
            return contestant
        contestant = replace(contestant, why_plain="a recorded graph failed")
    _run_once(contestant, tokens_T, plan)
    return contestant


def _dynamic_cache_bytes(cache: Any) -> int:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _reading(baseline: Contestant, tokens_T: Tensor, plan: LatencyPlan) -> dict[str, Any]:
    """Return which way of reading a prompt is the faster for the baseline, both measured."""
    seconds = {
        name: _run_once(replace(baseline, chunk=chunk), tokens_T, plan).timing.first_token_s
        for name, chunk in (("chunks", plan.chunk), ("at once", None))
    }
    return {
        "length": len(tokens_T),
        "chunks_s": seconds["chunks"],
        "at_once_s": seconds["at once"],
        "chosen": min(seconds, key=lambda name: seconds[name]),
    }


def _fitting(contestant: Contestant, length: int, plan: LatencyPlan, available: int) -> Contestant:
    """Return it reading in chunks where a prompt at once would not fit."""
    at_once = contestant.need(length, plan.dtype)
    if contestant.chunk is None and at_once.cache + at_once.working > available:
        return replace(contestant, chunk=plan.chunk)
    return contestant


def _measure(
    contestants: Sequence[Contestant],
    tokens_T: Tensor,
    plan: LatencyPlan,
    earlier: Sequence[dict[str, Any]],
    ceilings: Ceilings,
    failures: Failures,
    say: Callable[[str], None],
    available: Callable[[], int],
) -> list[dict[str, Any]]:
    """Return a point for each contestant at one length."""
    length = len(tokens_T)
    contestants = [_fitting(contestant, length, plan, available()) for contestant in contestants]
    obstacles = {c.who: _obstacle(c, length, plan, earlier, available()) for c in contestants}
    runs: dict[str, list[Run]] = {contestant.who: [] for contestant in contestants}
    for _ in range(plan.repeats):
        for contestant in contestants:
            spent_s = sum(run.timing.first_token_s for run in runs[contestant.who])
            limit_s = min(plan.limit_s, 2 * plan.once_s)
            if obstacles[contestant.who] or (spent_s and spent_s * (1 + 1 / len(runs[contestant.who])) > limit_s):
                continue
            say(f"{contestant.name}, {length_label(length)}")
            with failures.noted(contestant.name, contestant.who, length):
                try:
                    runs[contestant.who].append(_run_once(contestant, tokens_T, plan, say))
                except Exception as error:
                    if not _lacks_memory(error):
                        obstacles[contestant.who] = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
                        raise
                    obstacles[contestant.who] = {"status": "OOM", "reason": "caught: an allocation failed"}
            free_cached(tokens_T.device)
    points = []
    for contestant in contestants:
        point = {"who": contestant.who, "model": contestant.name, "length": length, "chunk": contestant.chunk}
        point |= {"predicted": asdict(contestant.need(length, plan.dtype))}
        point |= obstacles[contestant.who] or _figures(contestant, runs[contestant.who], length, plan, ceilings)
        if point["status"] != "measured":
            say(f"{contestant.name}, {length_label(length)}: {point['status']}, {point['reason']}")
        points.append(point)
    return points


def _lacks_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch says so of the CPU's memory in words alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate" in str(error)


def _obstacle(
    contestant: Contestant, length: int, plan: LatencyPlan, earlier: Sequence[dict[str, Any]], available: int
) -> dict[str, Any]:
    """Return why a run is not made, empty when it is."""
    need = contestant.need(length, plan.dtype)
    missing = need.cache + need.working - available  # the weights are there already
    if missing > 0:
        return {
            "status": "OOM",
            "reason": f"predicted: {human_bytes(need.cache)} cache and {human_bytes(need.working)} to work in, "
            f"{human_bytes(available)} are available",
        }
    before = next((point for point in reversed(earlier) if point["who"] == contestant.who), None)
    if before is None or before["status"] in ("OOM", "failed"):
        return {}
    seconds = before.get("first_token_s", before.get("expected_s", 0.0))
    expected_s = seconds * prefill_flops(contestant, length) / prefill_flops(contestant, before["length"])
    if expected_s <= plan.limit_s:
        return {}
    return {
        "status": "skipped",
        "reason": f"over the limit of {plan.limit_s:g} s",
        "expected_s": expected_s,
        "expected_from": f"{seconds:.4g} s at {before['length']:,} tokens, by the number of operations",
    }


def prefill_flops(contestant: Contestant, T: int) -> int:
    """Return the operations of reading T tokens: two a weight and token, and those of the attention layers."""
    config = contestant.config
    products = 2 * T * (contestant.parameters - 2 * config.vocab_size * config.hidden_size)
    return products + sum(sum(attention_flops(config, kind, T)) for kind in config.mixer_types)


def _run_once(
    contestant: Contestant, tokens_T: Tensor, plan: LatencyPlan, say: Callable[[str], None] = lambda line: None
) -> Run:
    memory, said = MemoryCurve(tokens_T.device), perf_counter()

    def note(tokens: int) -> None:
        nonlocal said
        memory.sample(tokens)
        if perf_counter() - said > SAY_EVERY_S:
            said = perf_counter()
            say(f"  {memory.tokens:,} of {len(tokens_T):,} tokens")

    with contestant.kernels():
        timing = timed_answer(
            contestant.model,
            contestant.empty_cache(len(tokens_T) + plan.new_tokens + 1),
            tokens_T,
            chunk=contestant.chunk or len(tokens_T),
            steps=plan.new_tokens,
            cache_bytes=contestant.cache_bytes,
            on_tokens=note,
            recorded=contestant.why_plain is None,
        )
    memory.sample(plan.new_tokens)
    return Run(timing, memory)


def _figures(
    contestant: Contestant, runs: Sequence[Run], length: int, plan: LatencyPlan, ceilings: Ceilings
) -> dict[str, Any]:
    timings = [run.timing for run in runs]
    decode_each_s = [seconds for timing in timings for seconds in timing.decode_each_s]
    # the run with the highest peak, for the curve that belongs to it
    highest = max(runs, key=lambda run: run.memory.peak_bytes or 0).memory
    start, peak = highest.start_bytes, highest.peak_bytes
    added = None if start is None or peak is None else peak - start
    weights = contestant.parameters * plan.dtype.itemsize
    first_token_s, decode_s = median(timing.first_token_s for timing in timings), median(decode_each_s)
    floor_s = prefill_flops(contestant, length) / ceilings.flops_s(plan.dtype)
    return {
        "status": "measured",
        "first_token_s": first_token_s,
        "first_token_floor_s": floor_s,
        "first_token_times_floor": first_token_s / floor_s,
        "first_token_each_s": [timing.first_token_s for timing in timings],
        "decode_s": decode_s,
        "decode_each_s": decode_each_s,
        "decode_tokens_s": 1 / decode_s,
        # of the time that reading the weights once would take
        "decode_share_of_bandwidth": contestant.decoded_weights * plan.dtype.itemsize / ceilings.bytes_s / decode_s,
        "cache_bytes": timings[0].cache_bytes,
        "weights_bytes": weights,
        "start_bytes": start,
        "peak_bytes": peak,
        "added_bytes": added,
        "curve": {"columns": ["tokens", "resident_bytes", "peak_bytes"], "samples": highest.samples},
    }


def times_faster(points: Sequence[dict[str, Any]]) -> Iterator[tuple[int, str, float]]:
    """Yield (length, figure, baseline / hybrid) wherever both were measured."""
    found = {(point["who"], point["length"]): point for point in points if point["status"] == "measured"}
    for who, length in found:
        if who == HYBRID and (BASELINE, length) in found:
            for figure in ("first_token_s", "decode_s"):
                yield length, figure, found[BASELINE, length][figure] / found[HYBRID, length][figure]
