"""Operators timed side by side: every backend, torch's SDPA at the same shape, and the machine's ceilings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter, process_time
from typing import Any, TypeVar

import torch

from sala.bench.cases import CASES, CORRELATION, Case, Inputs, Parity, Run, Work, backends
from sala.bench.ceilings import Ceilings, measure_ceilings
from sala.bench.cost import Cost
from sala.bench.environment import environment
from sala.bench.length import length_label
from sala.bench.shapes import attention_shape
from sala.errors import BackendError, InputError, SalaError, nearest
from sala.ops import dispatch

SDPA = "sdpa"
EAGER = "eager"
# samples of a call of milliseconds or less, for each sample of a longer one
COLD_SAMPLES = 5
# more than the last cache of any processor this runs on
FLUSH_BYTES = 256 * 2**20
# what SDPA may take: beyond it fewer heads are timed, and the time scaled
SDPA_SECONDS = 5.0
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": perf_counter, "cpu": process_time}
OPS_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}

Value = TypeVar("Value")


class ParityError(SalaError):
    """A backend that computes something else than the definition: its time means nothing."""


@dataclass(frozen=True, slots=True)
class OpsPlan:
    """What to time.

    ops, phases, only: empty means all. clock: "wall", or "cpu", the process's own time: with one thread the
    wall time of a machine that does nothing else. limit_s: a sample that would take longer, judged from the length before,
    is not taken.
    """

    shape: str = "minicpm-sala-9b"
    lengths: tuple[int, ...] = (4096, 16384)
    ops: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    repeats: int = 5
    independent: bool = False
    clock: str = "wall"
    limit_s: float = 300.0


@torch.inference_mode()
def run_ops(plan: OpsPlan, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Check and time every case of the plan, and return what `docs/benchmarks.md` describes.

    say: told each case before its work starts.

    Raises:
        InputError: no such shape, operator, phase or backend.
        ParityError: a backend differs from the definition; nothing of it is timed.
    """
    shape = attention_shape(plan.shape)
    clock = choice("clock", plan.clock, CLOCKS)
    cases = _chosen(plan)
    inputs = {case: Inputs(shape, plan.dtype, case.correlated and not plan.independent) for case in cases}
    runnable: dict[Case, list[str]] = {}
    parity: dict[str, dict[str, list[dict[str, Any]]]] = {}
    unavailable: dict[str, dict[str, str]] = {}
    for case in cases:
        say(f"{case.name}: parity")
        parity[case.name], runnable[case] = {}, []
        for name in backends(case.op):
            if plan.only and name not in plan.only:
                continue
            reason = dispatch.unavailable(case.op, name)
            if reason is None:
                try:
                    parity[case.name][name] = [asdict(found) for found in check(case, inputs[case], name)]
                    runnable[case].append(name)
                except BackendError as error:  # it does not take these tensors
                    reason = str(error)
            if reason is not None:
                unavailable.setdefault(case.name, {})[name] = reason
    say("ceilings of this machine")
    ceilings = measure_ceilings(clock)
    rows: list[dict[str, Any]] = []
    for case in cases:
        for length in sorted(plan.lengths):
            say(f"{case.name}, {length_label(length)}")
            earlier = next((row for row in reversed(rows) if (row["op"], row["phase"]) == (case.op, case.phase)), None)
            rows.append(_measure(case, inputs[case], length, runnable[case], plan, ceilings, earlier))
    return {
        "kind": "ops",
        "environment": environment(),
        "shape": {"name": plan.shape} | asdict(shape),
        "settings": {
            "dtype": _name(plan.dtype),
            "threads": torch.get_num_threads(),
            "repeats": plan.repeats,
            "clock": plan.clock,
            "limit_s": plan.limit_s,
        },
        "ceilings": asdict(ceilings),
        "unavailable": unavailable,
        "parity": parity,
        "cases": rows,
    }


def check(case: Case, inputs: Inputs, backend: str) -> list[Parity]:
    """Compare a backend with the definition on a short input of the same shape.

    Raises:
        ParityError: it differs by more than the dtype's tolerance.
    """
    checks = case.parity(inputs, backend)
    for found in checks:
        if not found.holds:
            raise ParityError(
                f"{case.name}, backend {backend}, {_name(inputs.dtype)}: differs from {found.against} by {found.error:.3g}, "
                f"right would be at most {found.tolerance:.3g}; not timed"
            )
    return checks


def choice(what: str, name: str, known: Mapping[str, Value]) -> Value:
    """Return what goes by `name`.

    Raises:
        InputError: nothing does; names the nearest.
    """
    if name not in known:
        raise InputError(f"{what} {name!r}; right would be one of {', '.join(known)}{nearest(name, known)}")
    return known[name]


def _chosen(plan: OpsPlan) -> list[Case]:
    for what, names, known in (
        ("operator", plan.ops, {case.op for case in CASES}),
        ("phase", plan.phases, {case.phase for case in CASES}),
        ("backend", plan.only, {name for case in CASES for name in backends(case.op)}),
    ):
        for name in names:
            if name not in known:
                raise InputError(f"no {what} {name!r}; there are {', '.join(sorted(known))}{nearest(name, known)}")
    if plan.repeats < 1 or not plan.lengths:
        raise InputError(f"{plan.repeats} repeats of {len(plan.lengths)} lengths; right would be at least one of each")
    cases = [
        case
        for case in CASES
        if (not plan.ops or case.op in plan.ops) and (not plan.phases or case.phase in plan.phases)
    ]
    if not cases:
        raise InputError(f"no case is one of {', '.join(plan.ops)} and of {', '.join(plan.phases)}")
    return cases


@dataclass(slots=True)
class _Competitor:
    run: Run | None
    # whole work / what is timed of it
    factor: float
    facts: dict[str, Any]
    samples_s: list[float]


def _measure(
    case: Case,
    inputs: Inputs,
    length: int,
    names: Sequence[str],
    plan: OpsPlan,
    ceilings: Ceilings,
    earlier: dict[str, Any] | None,
) -> dict[str, Any]:
    cost = case.cost(inputs.shape, length, plan.dtype.itemsize)
    row: dict[str, Any] = {
        "op": case.op,
        "phase": case.phase,
        "length": length,
        "inputs": f"random walk {CORRELATION}" if inputs.correlated else "independent",
        "cold": case.cold,
        "cost": asdict(cost),
    }
    try:
        work = case.work(inputs, length)
    except InputError as error:
        return row | {"skipped": str(error), "competitors": {}}
    competitors = _competitors(work, names, cost, plan, earlier)
    flush = torch.zeros(FLUSH_BYTES // 4) if case.cold else None
    clock, samples = CLOCKS[plan.clock], plan.repeats * (COLD_SAMPLES if case.cold else 1)
    timed = [competitor for competitor in competitors.values() if competitor.run is not None]
    for index in range(samples + case.cold):  # a short call's first sample is its warm-up
        for competitor in timed:
            if flush is not None:
                flush.add_(1)
            assert competitor.run is not None
            started = clock()
            competitor.run()
            if not case.cold or index:
                competitor.samples_s.append((clock() - started) * competitor.factor)
    roof_s, bound = _roof(cost, plan.dtype, ceilings)
    row["bound"], row["roof_s"] = bound, roof_s
    row["competitors"] = {name: _facts(competitor, cost, roof_s) for name, competitor in competitors.items()}
    return row | _ratios(row["competitors"], names)


def _competitors(
    work: Work, names: Sequence[str], cost: Cost, plan: OpsPlan, earlier: dict[str, Any] | None
) -> dict[str, _Competitor]:
    runs = {name: work.backend(name) for name in names}
    competitors = {}
    for name, run in runs.items():
        expected_s = _expected_s(name, cost, earlier)
        if expected_s is not None and expected_s > plan.limit_s:
            skipped = {"skipped": f"over the limit of {plan.limit_s:g} s", "expected_s": expected_s}
            competitors[name] = _Competitor(None, 1.0, skipped, [])
        else:
            competitors[name] = _Competitor(run, 1.0, {}, [])
    if work.sdpa is not None:
        sdpa = work.sdpa(SDPA_SECONDS)
        facts = {"heads": sdpa.heads, "heads_measured": sdpa.heads_measured}
        competitors[SDPA] = _Competitor(sdpa.run, sdpa.heads / sdpa.heads_measured, facts, [])
    return competitors


def _expected_s(name: str, cost: Cost, earlier: dict[str, Any] | None) -> float | None:
    """Return what a sample will take, by the operations that it has more than one at an earlier length."""
    if earlier is None or name not in earlier["competitors"]:
        return None
    facts = earlier["competitors"][name]
    seconds = facts.get("median_s", facts.get("expected_s"))
    return seconds * cost.flops / earlier["cost"]["flops"]


def _roof(cost: Cost, dtype: torch.dtype, ceilings: Ceilings) -> tuple[float, str]:
    """Return the least seconds that the measured ceilings allow, and which of them decides."""
    compute_s, memory_s = cost.flops / ceilings.flops_s(dtype), cost.bytes / ceilings.bytes_s
    return (compute_s, "compute") if compute_s > memory_s else (memory_s, "memory")


def _facts(competitor: _Competitor, cost: Cost, roof_s: float) -> dict[str, Any]:
    if not competitor.samples_s:
        return competitor.facts
    seconds = median(competitor.samples_s)
    facts = {"median_s": seconds, "min_s": min(competitor.samples_s), "samples_s": competitor.samples_s}
    if "heads" in competitor.facts:  # SDPA does other work than the operator's: its own share says nothing here
        return competitor.facts | facts
    return facts | {
        "flops_s": cost.flops / seconds,
        "bytes_s": cost.bytes / seconds,
        "share_of_ceiling": roof_s / seconds,
    }


def _ratios(competitors: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return how many times faster each backend is than SDPA, and than the operator in torch alone, by their medians."""
    seconds = {name: facts["median_s"] for name, facts in competitors.items() if "median_s" in facts}
    return {
        f"times_faster_than_{other}": {
            name: seconds[other] / seconds[name] for name in names if name in seconds and name != other
        }
        for other in (SDPA, EAGER)
        if other in seconds
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
