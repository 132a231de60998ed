"""What this machine can do at best: products of large matrices, and reading and copying memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

MATMUL_SIZE = 2048
# far larger than any cache
MEMORY_BYTES = 512 * 2**20
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
def measure_ceilings(clock: Callable[[], float] = perf_counter) -> Ceilings:
    """Measure with torch's present number of threads, on the clock that the operators are timed with.

    A product of square matrices of n rows counts 2 n^3 operations; a sum reads each byte once, a copy reads and writes it.
    """
    flops_s = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype) for _ in range(2))
        flops_s[str(dtype).removeprefix("torch.")] = 2 * MATMUL_SIZE**3 / _best(partial(torch.matmul, a, b), clock)
    source = torch.ones(MEMORY_BYTES // 4)
    target = torch.empty_like(source)
    return Ceilings(
        matmul_flops_s=flops_s,
        read_bytes_s=MEMORY_BYTES / _best(source.sum, clock),
        copy_bytes_s=2 * MEMORY_BYTES / _best(partial(target.copy_, source), clock),
    )


def _best(work: Callable[[], object], clock: Callable[[], float]) -> float:
    work()
    seconds = []
    for _ in range(REPEATS):
        started = clock()
        work()
        seconds.append(clock() - started)
    return min(seconds)
