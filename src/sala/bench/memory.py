"""The peak of memory over a piece of work: of this process, where the system tells it, or of what torch holds on a GPU."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from sala.bench.device import CPU, free_cached

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): resets VmHWM to the present resident size


@dataclass
class PeakMemory:
    """start_bytes: size before the work; peak_bytes: its peak during the work. None where not measurable."""

    start_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def added_bytes(self) -> int | None:
        """What the work took on top of what was there; too low where the C library keeps memory that was freed."""
        if self.start_bytes is None or self.peak_bytes is None:
            return None
        return self.peak_bytes - self.start_bytes


@contextmanager
def peak_memory(device: torch.device = CPU) -> Iterator[PeakMemory]:
    """Measure the work inside `with`: tensors on a GPU, or the process's resident memory (on Linux; elsewhere None)."""
    measured = PeakMemory()
    gauge = _gauge(device)
    gauge.settle()
    try:
        gauge.reset()
        measured.start_bytes = gauge.now()
    except OSError:
        yield measured
        return
    yield measured
    measured.peak_bytes = gauge.peak()


class MemorySample(NamedTuple):
    """Memory after `tokens` tokens, resident or on the GPU, and its peak since the sample before."""

    tokens: int
    resident_bytes: int
    peak_bytes: int


class MemoryCurve:
    """Memory against tokens read; its `samples` stay empty where the system does not tell."""

    def __init__(self, device: torch.device = CPU) -> None:
        self._gauge = _gauge(device)
        self._gauge.settle()
        self.samples: list[MemorySample] = []
        self.tokens = 0
        self._measurable = True
        self.start_bytes: int | None = None
        self.sample(0)
        if self.samples:
            self.start_bytes = self.samples[0].resident_bytes

    def sample(self, more_tokens: int) -> None:
        """Take a sample after `more_tokens` further tokens."""
        self.tokens += more_tokens
        if self._measurable:
            try:
                sample = MemorySample(self.tokens, self._gauge.now(), self._gauge.peak())
                self._gauge.reset()
            except OSError:
                self._measurable = False
                return
            # before the first sample there was no work of ours
            self.samples.append(sample if self.samples else sample._replace(peak_bytes=sample.resident_bytes))

    @property
    def peak_bytes(self) -> int | None:
        return max((sample.peak_bytes for sample in self.samples), default=None)


class _Process:
    """This process's resident memory; an OSError where the system does not tell it."""

    def settle(self) -> None:
        """Hand memory that was freed back to the system, with glibc; else work that fits into it would seem to take none."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if trim is not None:
            trim(0)

    def reset(self) -> None:
        CLEAR.write_text(RESET_PEAK)

    def now(self) -> int:
        return _resident("VmRSS")

    def peak(self) -> int:
        return _resident("VmHWM")


@dataclass(frozen=True)
class _Gpu:
    """What torch's tensors take on a GPU, which is not what its allocator keeps for later use."""

    device: torch.device

    def settle(self) -> None:
        gc.collect()
        free_cached(self.device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


def _gauge(device: torch.device) -> _Process | _Gpu:
    return _Gpu(device) if device.type == "cuda" else _Process()


def _resident(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {name}")
