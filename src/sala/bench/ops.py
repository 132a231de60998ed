"""Operators timed side by side: every backend, torch's SDPA at the same shape, and the machine's ceilings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch

from sala.bench.cases import CASES, Case, Work
from sala.bench.ceilings import Ceilings, measure_ceilings
from sala.bench.cost import Cost
from sala.bench.device import CLOCKS, Timer, free_cached, timer_of
from sala.bench.environment import environment
from sala.bench.failures import Failures
from sala.bench.fla import FLA
from sala.bench.inputs import CORRELATION, Inputs
from sala.bench.length import length_label
from sala.bench.memory import peak_memory
from sala.bench.parity import Parity
from sala.bench.sdpa import Run
from sala.bench.shapes import attention_shape
from sala.engine.load import find_device
from sala.errors import BackendError, InputError, SalaError, nearest

SDPA = "sdpa"
EAGER = "eager"
# whose times the ratios are of
AGAINST = (SDPA, EAGER, FLA)
# samples of a call of milliseconds or less, for each sample of a longer one
SHORT_SAMPLES = 5

Value = TypeVar("Value")


class ParityError(SalaError):
    """A backend that computes something else than the definition: its time means nothing."""


@dataclass(frozen=True, slots=True)
class OpsPlan:
    """What to time.

    ops, phases, only: empty means all. device: a name of torch's, or "auto" for a GPU where there is one. clock: on a CPU
    "wall", or "cpu", the process's own time: with one thread the wall time of a machine that does nothing else. repeats:
    samples of each competitor, more of a short call. limit_s: a sample that would take longer, judged from the length
    before, is not taken.
    """

    shape: str = "minicpm-sala-9b"
    lengths: tuple[int, ...] = (4096, 16384)
    ops: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    device: str = "auto"
    repeats: int = 5
    independent: bool = False
    clock: str = "wall"
    limit_s: float = 300.0


def run_ops(
    plan: OpsPlan,
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Check and time every case of the plan, and return what `docs/benchmarks.md` describes.

    A competitor that differs from the definition, or that fails, is not timed and stands under `failures`; the others are.

    say: told each case before its work starts. keep: given the results so far after every case and length.

    Raises:
        InputError: no such shape, operator, phase, backend or device.
    """
    shape = attention_shape(plan.shape)
    choice("clock", plan.clock, CLOCKS)
    device = find_device(plan.device)
    cases = _chosen(plan, device)
    timer = timer_of(device, plan.clock)
    bench = _Bench(plan, timer, say)
    for case in cases:
        inputs = Inputs(shape, plan.dtype, case.correlated and not plan.independent, device=device)
        bench.check(case, inputs)
    say("ceilings of this machine")
    ceilings = measure_ceilings(timer, plan.dtype)
    rows: list[dict[str, Any]] = []
    results = {
        "kind": "ops",
        "environment": environment(),
        "shape": {"name": plan.shape} | asdict(shape),
        "settings": {
            "dtype": _name(plan.dtype),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "repeats": plan.repeats,
            "clock": plan.clock,
            "limit_s": plan.limit_s,
        },
        "ceilings": asdict(ceilings),
        "unavailable": bench.unavailable,
        "parity": bench.parity,
        "failures": bench.failures.rows,
        "cases": rows,
    }
    for case in cases:
        inputs = Inputs(shape, plan.dtype, case.correlated and not plan.independent, device=device)
        for length in sorted(plan.lengths):
            say(f"{case.name}, {length_label(length)}")
            earlier = next((row for row in reversed(rows) if (row["op"], row["phase"]) == (case.op, case.phase)), None)
            with torch.inference_mode(not case.trains):
                rows.append(bench.measure(case, inputs, length, ceilings, earlier))
            free_cached(device)
            keep(results)
    return results


def check(case: Case, inputs: Inputs, backend: str) -> list[Parity]:
    """Compare a backend with the definition on a short input of the same shape.

    Raises:
        ParityError: it differs by more than the dtype's tolerance.
    """
    with torch.inference_mode(not case.trains):
        checks = case.parity(inputs, backend)
    for found in checks:
        if not found.holds:
            raise ParityError(
                f"{case.name}, backend {backend}, {_name(inputs.dtype)}: differs from {found.against} by {found.error:.3g}, "
                f"expected at most {found.tolerance:.3g}; not timed"
            )
    return checks


def choice(what: str, name: str, known: Mapping[str, Value]) -> Value:
    """Return what goes by `name`.

    Raises:
        InputError: nothing does; names the nearest.
    """
    if name not in known:
        raise InputError(f"{what} {name!r}; expected one of {', '.join(known)}{nearest(name, known)}")
    return known[name]


def _chosen(plan: OpsPlan, device: torch.device) -> list[Case]:
    for what, names, known in (
        ("operator", plan.ops, {case.op for case in CASES}),
        ("phase", plan.phases, {case.phase for case in CASES}),
        ("backend", plan.only, {name for case in CASES for name in case.competitors(device)}),
    ):
        for name in names:
            if name not in known:
                raise InputError(f"no {what} {name!r}; there are {', '.join(sorted(known))}{nearest(name, known)}")
    if plan.repeats < 1 or not plan.lengths:
        raise InputError(f"{plan.repeats} repeats of {len(plan.lengths)} lengths; expected at least one of each")
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
    """run: None where it is not timed. factor: whole work / what is timed of it."""

    run: Run | None
    factor: float = 1.0
    facts: dict[str, Any] = field(default_factory=dict)
    samples_s: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)


class _Bench:
    """What is known of the competitors so far, and what times them."""

    def __init__(self, plan: OpsPlan, timer: Timer, say: Callable[[str], None]):
        self.plan, self.timer, self.say = plan, timer, say
        self.runnable: dict[str, list[str]] = {}
        self.parity: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.unavailable: dict[str, dict[str, str]] = {}
        self.failures = Failures(say)
        # by the check, which two cases may share, and the backend
        self.checked: dict[tuple[Any, str], list[Parity]] = {}

    def check(self, case: Case, inputs: Inputs) -> None:
        """Find out which competitors run and compute the right thing."""
        self.say(f"{case.name}: parity")
        self.parity[case.name], self.runnable[case.name] = {}, []
        for name in case.competitors(inputs.device):
            if self.plan.only and name not in self.plan.only:
                continue
            reason = case.unavailable(name)
            if reason is None:
                with self.failures.noted(case.name, name):
                    try:
                        key = (case.parity, name)
                        if key not in self.checked:
                            self.checked[key] = check(case, inputs, name)
                        self.parity[case.name][name] = [asdict(found) for found in self.checked[key]]
                        self.runnable[case.name].append(name)
                    except BackendError as error:  # it does not take these tensors
                        reason = str(error)
            if reason is not None:
                self.unavailable.setdefault(case.name, {})[name] = reason

    def measure(
        self, case: Case, inputs: Inputs, length: int, ceilings: Ceilings, earlier: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return the row of a case at one length."""
        plan, names = self.plan, self.runnable[case.name]
        cost = case.cost(inputs.shape, length, plan.dtype.itemsize)
        row: dict[str, Any] = {
            "op": case.op,
            "phase": case.phase,
            "length": length,
            "inputs": f"random walk {CORRELATION}" if inputs.correlated else "independent",
            # on a GPU nothing is in the caches in any case
            "cold": case.cold or inputs.device.type == "cuda",
            "cost": asdict(cost),
        }
        try:
            work = case.work(inputs, length)
        except InputError as error:
            return row | {"skipped": str(error), "competitors": {}}
        competitors = self._competitors(case, work, cost, length, earlier)
        self._sample(case, competitors, row["cold"])
        roof_s, bound = _roof(cost, plan.dtype, ceilings)
        row["bound"], row["roof_s"] = bound, roof_s
        row["competitors"] = {name: _facts(competitor, cost, roof_s) for name, competitor in competitors.items()}
        return row | _ratios(row["competitors"], names)

    def _competitors(
        self, case: Case, work: Work, cost: Cost, length: int, earlier: dict[str, Any] | None
    ) -> dict[str, _Competitor]:
        competitors = {}
        for name in self.runnable[case.name]:
            expected_s = _expected_s(name, cost, earlier)
            if expected_s is not None and expected_s > self.plan.limit_s:
                skipped = {"skipped": f"over the limit of {self.plan.limit_s:g} s", "expected_s": expected_s}
                competitors[name] = _Competitor(None, facts=skipped)
                continue
            competitors[name] = _Competitor(None, facts={"skipped": "failed"})
            with self.failures.noted(case.name, name, length):
                run = work.backend(name)
                try:
                    competitors[name] = _Competitor(run, facts=self._warmed_up(run))
                except torch.OutOfMemoryError:
                    competitors[name] = _Competitor(None, facts={"skipped": "out of memory"})
        if work.sdpa is not None:
            with self.failures.noted(case.name, SDPA, length):
                sdpa = work.sdpa(self.timer)
                facts: dict[str, Any] = {"heads": sdpa.heads, "heads_measured": sdpa.heads_measured}
                if sdpa.kernel is not None:
                    facts |= {"kernel": sdpa.kernel, "kernels": dict(sdpa.kernels)} | self._warmed_up(sdpa.run)
                competitors[SDPA] = _Competitor(sdpa.run, sdpa.heads / sdpa.heads_measured, facts)
        return competitors

    def _warmed_up(self, run: Run) -> dict[str, Any]:
        """On a GPU, compile, choose tunings, and return the memory that a call takes at its peak."""
        if self.timer.device.type != "cuda":
            return {}
        run()
        with peak_memory(self.timer.device) as memory:
            run()
        return {"added_bytes": memory.added_bytes}

    def _sample(self, case: Case, competitors: Mapping[str, _Competitor], cold: bool) -> None:
        """Take turns: a first call of a short one is its warm-up on a CPU."""
        timer, began = self.timer, perf_counter()
        warm_up = case.cold and timer.device.type == "cpu"
        for index in range(self.plan.repeats * (SHORT_SAMPLES if cold else 1) + warm_up):
            if index >= self.plan.repeats + warm_up and perf_counter() - began > timer.enough_s:
                break
            for competitor in competitors.values():
                if competitor.run is None:
                    continue
                seconds = timer.seconds(competitor.run, cold=cold) * competitor.factor
                host_s = timer.enqueued()
                if index or not warm_up:
                    competitor.samples_s.append(seconds)
                    competitor.host_s += [] if host_s is None else [host_s]


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
    if competitor.host_s:
        facts["enqueued_s"] = median(competitor.host_s)
    facts |= competitor.facts
    if "heads" in competitor.facts:  # SDPA does other work than the operator's: its own share says nothing here
        return facts
    return facts | {
        "flops_s": cost.flops / seconds,
        "bytes_s": cost.bytes / seconds,
        "share_of_ceiling": roof_s / seconds,
        "times_floor": seconds / roof_s,
    }


def _ratios(competitors: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Return how many times faster each backend is than SDPA, the operator in torch alone, and fla, by their medians."""
    seconds = {name: facts["median_s"] for name, facts in competitors.items() if "median_s" in facts}
    return {
        f"times_faster_than_{other}": {
            name: seconds[other] / seconds[name] for name in names if name in seconds and name != other
        }
        for other in AGAINST
        if other in seconds
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
