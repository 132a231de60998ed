"""Where the `triton` backends are tested: on the GPU where there is one, else on the CPU, by Triton's interpreter."""

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch.utils._pytree import tree_map_only

from sala.ops import gpu

GPU = torch.cuda.is_available()


def memory_for(num_bytes: int) -> torch.Tensor:
    """Return numbers in float16 that take memory only where they are written, to test addresses far apart."""
    without_reserve = 0x4000  # Linux; `mmap` has its name from Python 3.12 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | without_reserve
    return torch.frombuffer(mmap.mmap(-1, num_bytes, flags=flags), dtype=torch.float16)


def row(backend: str, *values: object) -> ParameterSet:
    """Return a row of a test's parameters, a backend first; marked `gpu` where a GPU will run it, or would have to."""
    marks = _marks_of_triton(*values) if backend == "triton" else []
    return pytest.param(backend, *values, marks=marks, id="-".join(map(str, (backend, *values))))


def needs_triton(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test of the `triton` backend alone as a `row` of it."""
    for mark in _marks_of_triton():
        test = mark(test)
    return test


def _marks_of_triton(*values: object) -> list[pytest.MarkDecorator]:
    marks = []
    # the interpreter multiplies bfloat16 wrongly
    if GPU or torch.bfloat16 in values:
        marks.append(pytest.mark.gpu)
    if (reason := gpu.unavailable()) is not None:
        marks.append(pytest.mark.skip(reason=reason))
    return marks


def on_device_of(backend: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call an operator with tensors on the device that its backend runs on, and return its results on the CPU."""
    if backend != "triton" or not GPU:
        return function(*arguments, backend=backend, **options)
    arguments, options = tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), (arguments, options))
    return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), function(*arguments, backend=backend, **options))
