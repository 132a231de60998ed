"""What this machine can do at best: products of large matrices, and reading and copying memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from sala.bench.device import Timer

# rows of a square matrix, and bytes far larger than any cache
SIZES = {"cpu": (2048, 512 * 2**20), "cuda": (8192, 4 * 2**30)}
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Best of `REPEATS`: matmul_flops_s by dtype; bytes moved a second by reading (a sum) and by copying (read and write)."""

    matmul_flops_s: dict[str, float]
    read_bytes_s: float
    copy_bytes_s: float

    def flops_s(self, dtype: torch.dtype) -> float:
        return self.matmul_flops_s[str(dtype).removeprefix("torch.")]

    @property
    def bytes_s(self) -> float:
        return max(self.read_bytes_s, self.copy_bytes_s)


@torch.inference_mode()
def measure_ceilings(timer: Timer, dtype: torch.dtype) -> Ceilings:
    """Measure with torch's present number of threads, on the clock that the operators are timed with.

    A product of square matrices of n rows counts 2 n^3 operations, in float32, bfloat16 and `dtype`; a sum reads each byte
    once, a copy reads and writes it.
    """
    rows, _ = SIZES[timer.device.type]
    flops_s = {}
    for kind in dict.fromkeys((torch.float32, torch.bfloat16, dtype)):
        # of random numbers: zeros are multiplied faster
        a, b = (torch.randn(rows, rows, device=timer.device).to(kind) for _ in range(2))
        flops_s[str(kind).removeprefix("torch.")] = 2 * rows**3 / _best(partial(torch.matmul, a, b), timer)
    read_bytes_s, copy_bytes_s = measure_bandwidth(timer)
    return Ceilings(flops_s, read_bytes_s, copy_bytes_s)


@torch.inference_mode()
def measure_bandwidth(timer: Timer) -> tuple[float, float]:
    """Return (read, copied): bytes a second of memory; those of a copy count twice."""
    _, size = SIZES[timer.device.type]
    source = torch.ones(size // 4, device=timer.device)
    target = torch.empty_like(source)
    return size / _best(source.sum, timer), 2 * size / _best(partial(target.copy_, source), timer)


def _best(work: Callable[[], object], timer: Timer) -> float:
    work()
    return min(timer.seconds(work) for _ in range(REPEATS))
