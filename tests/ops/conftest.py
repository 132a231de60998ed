"""Processes that have not built the native library; and of every kernel that Triton's interpreter runs, that it keeps to its tensors."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from devices import GPU
from sala.ops import gpu
from sala.ops.native import library


def spans(value: Any) -> Iterator[tuple[int, int]]:
    """Return from where to where in memory the tensors among a kernel's arguments reach."""
    if isinstance(value, tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from spans(part)
    elif isinstance(value, Tensor) and value.numel():
        last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        yield value.data_ptr(), value.data_ptr() + (last + 1) * value.itemsize


@pytest.fixture(autouse=True)
def kernels_keep_to_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse addresses outside a kernel's tensors, and one that two programs write.

    The interpreter runs programs in order, so that a later one may put right what an earlier one wrote in its place;
    what lies behind a tensor is there, and seldom looked at.
    """
    if GPU or gpu.unavailable() is not None:
        return
    interpreter = import_module("triton.runtime.interpreter")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    run, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    inside: list[tuple[int, int]] = []
    written: dict[tuple[int, ...], list[np.ndarray]] = {}

    def addresses(pointers: Any, mask: Any) -> np.ndarray:
        at = pointers.data[mask.data]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        assert not at.size or any(first <= at.min() and at.max() + size <= end for first, end in inside), (
            "beyond a tensor"
        )
        return at

    def run_watched(self: Any, *arguments: Any, **options: Any) -> None:
        inside[:] = spans((arguments, options))
        written.clear()
        run(self, *arguments, **options)
        every = np.concatenate([np.empty(0, np.uint64), *(np.unique(np.concatenate(x)) for x in written.values())])
        assert len(np.unique(every)) == len(every), f"two programs of {self.fn.__name__} write to one place"

    def load_watched(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses(pointers, mask)
        return load(self, pointers, mask, *rest)

    def store_watched(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        written.setdefault(self.grid_idx, []).append(addresses(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(executor, "__call__", run_watched)
    monkeypatch.setattr(builder, "create_masked_load", load_watched)
    monkeypatch.setattr(builder, "create_masked_store", store_watched)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not looked for the library yet, with a cache of its own."""
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setenv("SALA_CACHE", str(tmp_path))
    monkeypatch.delenv("SALA_CPU_LEVEL", raising=False)
    return tmp_path


@pytest.fixture
def small(fresh, monkeypatch, tmp_path_factory):
    """The same with one small source, so that building takes no time."""
    sources = tmp_path_factory.mktemp("sources")
    for name in ("prepare.cpp", "parallel.h"):
        (sources / name).write_bytes((library.SOURCES / name).read_bytes())
    monkeypatch.setattr(library, "SOURCES", sources)
    return fresh
