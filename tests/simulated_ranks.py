"""Ranks as threads of one process: what they gather is one graph, so that autograd answers for all of them at once."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class ThreadContext:
    def __init__(self, rank: int, shared: list, barrier: threading.Barrier):
        self.rank, self.ranks = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def gather(self, x: Tensor) -> Tensor:
        self._shared[self.rank] = x
        self._barrier.wait()
        gathered = torch.stack(self._shared)
        # nobody writes the next one before all have read this one
        self._barrier.wait()
        return gathered


def on_ranks(ranks: int, run: Callable[[ThreadContext], Result]) -> list[Result]:
    """Return `run(context)` of every rank, in their order."""
    # ends a test whose ranks gather unequally often; long, as one may compile while the others wait
    barrier = threading.Barrier(ranks, timeout=600)
    shared: list = [None] * ranks

    def guarded(rank: int) -> Result:
        try:
            return run(ThreadContext(rank, shared, barrier))
        except threading.BrokenBarrierError:
            raise
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(ranks)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
