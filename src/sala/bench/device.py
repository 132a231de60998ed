"""How work is timed on the device that is measured: on the host's clocks, or between a GPU's own events."""

import math
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter, process_time
from typing import Protocol

import torch

from sala.errors import InputError

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": perf_counter, "cpu": process_time}
# more than the last cache of any processor and of any GPU this runs on
FLUSH_BYTES = 256 * 2**20
# two milliseconds and more at a GPU's two gigahertz: what Python needs to enqueue an operator
SPIN_CYCLES = 4_000_000

CPU = torch.device("cpu")


class Timer(Protocol):
    """Runs work and says how long it took."""

    device: torch.device
    # when this much has been spent on samples of a case, those that must be taken are enough
    enough_s: float

    def seconds(self, run: Callable[[], object], *, cold: bool = False) -> float:
        """Return the seconds of one call. cold: what it reads is in memory then, and in no cache."""
        ...

    def enqueued(self) -> float | None:
        """Return the median seconds that the host took to start the calls since this was last asked; None on a CPU."""
        ...


class HostTimer:
    """A clock of the host around a call: `wall`, or `cpu`, the process's own time."""

    device = CPU
    enough_s = math.inf

    def __init__(self, clock: str = "wall"):
        self.clock = CLOCKS[clock]
        self.flush = torch.zeros(0)

    def seconds(self, run: Callable[[], object], *, cold: bool = False) -> float:
        if cold:
            if not len(self.flush):
                self.flush = torch.zeros(FLUSH_BYTES // 4)
            self.flush.add_(1)
        started = self.clock()
        run()
        return self.clock() - started

    def enqueued(self) -> None:
        return None


class CudaTimer:
    """Events of a GPU around a call that finds nothing in the caches.

    The GPU is kept busy until the host has enqueued the whole call, so that the time is the GPU's and not Python's. Where
    enqueuing takes longer than `SPIN_CYCLES`, or the call itself waits for the GPU, gaps are in it: `enqueued` tells.
    """

    enough_s = 1.0

    def __init__(self, device: torch.device):
        self.device = device
        self.flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self.started, self.ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.host_s: list[float] = []

    def seconds(self, run: Callable[[], object], *, cold: bool = False) -> float:
        # all are cold: layers that run between two calls of an operator leave nothing of it behind
        self.flush.add_(1)
        torch.cuda._sleep(SPIN_CYCLES)
        self.started.record()
        began = perf_counter()
        run()
        self.host_s.append(perf_counter() - began)
        self.ended.record()
        self.ended.synchronize()
        return self.started.elapsed_time(self.ended) / 1e3

    def enqueued(self) -> float | None:
        taken, self.host_s = self.host_s, []
        return median(taken) if taken else None


def timer_of(device: torch.device, clock: str = "wall") -> Timer:
    """Return what times work on a device.

    Raises:
        InputError: another clock than "wall" is asked for on a GPU, which has one, its own.
    """
    if device.type != "cuda":
        return HostTimer(clock)
    if clock != "wall":
        raise InputError(f"clock {clock!r} on a GPU, which is timed by its own; leave the option out")
    return CudaTimer(device)


def synchronize(device: torch.device) -> None:
    """Wait until all work that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_cached(device: torch.device) -> None:
    """Give back what torch holds of the device's memory for later use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
