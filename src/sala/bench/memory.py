"""The peak of this process's memory over a piece of work, where the system tells it."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): resets VmHWM to the present resident size


@dataclass
class PeakMemory:
    """start_bytes: resident size before the work; peak_bytes: its peak during the work. None where not measurable."""

    start_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def added_bytes(self) -> int | None:
        """What the work took on top of what was there; too low where the C library keeps memory that was freed."""
        if self.start_bytes is None or self.peak_bytes is None:
            return None
        return self.peak_bytes - self.start_bytes


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure the resident memory of the work inside `with`; on Linux only, elsewhere the fields stay None."""
    measured = PeakMemory()
    gc.collect()
    _give_back_freed()
    try:
        CLEAR.write_text(RESET_PEAK)
        measured.start_bytes = _resident("VmRSS")
    except OSError:
        yield measured
        return
    yield measured
    measured.peak_bytes = _resident("VmHWM")


class MemorySample(NamedTuple):
    """Resident size after `tokens` tokens, and its peak since the sample before."""

    tokens: int
    resident_bytes: int
    peak_bytes: int


class MemoryCurve:
    """Resident memory against tokens read; its `samples` stay empty where the system does not tell."""

    def __init__(self) -> None:
        gc.collect()
        _give_back_freed()
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
                sample = MemorySample(self.tokens, _resident("VmRSS"), _resident("VmHWM"))
                CLEAR.write_text(RESET_PEAK)
            except OSError:
                self._measurable = False
                return
            # before the first sample there was no work of ours
            self.samples.append(sample if self.samples else sample._replace(peak_bytes=sample.resident_bytes))

    @property
    def peak_bytes(self) -> int | None:
        return max((sample.peak_bytes for sample in self.samples), default=None)


def _give_back_freed() -> None:
    """Hand memory that was freed back to the system, with glibc; else work that fits into it would seem to take none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _resident(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {name}")
