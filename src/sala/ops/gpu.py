"""What the operators' `triton` backends stand on: where Triton runs, what it takes, its functions as torch operators.

Nothing here imports Triton: it is imported with a backend's file, when that is chosen.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sala.errors import BackendError
from sala.ops.native.operator import OPERATORS, watched

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# bfloat16 in the tensor cores and asynchronous copies, which the kernels are written for
CAPABILITY = (8, 0)
MAX_WIDTH = 256
# of a tile of queries that a program of block-sparse attention holds, of keys, or of values: 64 rows of 128 numbers of two
# bytes each. With it every shape fits into the shared memory of every card
TILE_BYTES = 2**14
# programs side by side in the second direction of a grid, CUDA's limit
MAX_GROUPS = 2**16 - 1
# tokens may lie so far apart, in numbers: within a program, of 128 tokens at most, their distances are of 32 bits
MAX_APART = 2**24
# of elementwise work, where all threads of a program hold one row
MAX_ROW = 2**15


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU: for tests, at small sizes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def device_type() -> str:
    """Return the type of device whose tensors the kernels take."""
    return "cpu" if interpreted() else "cuda"


# torch.compile takes the answer as it is now: what it rests on cannot be traced
@torch.compiler.assume_constant_result
def unavailable() -> str | None:
    """Return why Triton cannot run on this machine, None when it can."""
    return _unavailable(interpreted())


@functools.cache
def _unavailable(interpreted: bool) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed; torch for CUDA brings it, else pip install triton"
    if interpreted:
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < CAPABILITY:
        return (
            f"the GPU's compute capability is {capability[0]}.{capability[1]}; it needs {CAPABILITY[0]}.{CAPABILITY[1]}"
        )
    return None


def describe() -> str:
    """Return what runs the kernels, in words."""
    return "Triton's interpreter, for tests" if interpreted() else f"Triton on {torch.cuda.get_device_name()}"


def refuses(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why a kernel does not take these tensors, None when it does."""
    device = device_type()
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != device:
            return f"a tensor is on {tensor.device}; it runs on {device}"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"a tensor is {tensor.dtype}; it takes float32, bfloat16 and float16"
        if tensor.dtype == torch.bfloat16 and interpreted():
            return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


def refuses_states(tensors: Sequence[Tensor | None]) -> str | None:
    """As `refuses`, for lightning's q, k, v, log_decay, ..."""
    if tensors and (log_decay := tensors[3]) is not None and torch.is_grad_enabled() and log_decay.requires_grad:
        return "a gradient of log_decay is wanted and it has none"
    return refuses(tensors)


def refuses_rows(tensors: Sequence[Tensor | None]) -> str | None:
    """As `refuses`, for elementwise work: one dtype, and no gradients."""
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.dtype != given[0].dtype:
            return f"tensors are {given[0].dtype} and {tensor.dtype}; it takes one dtype"
        if torch.is_grad_enabled() and tensor.requires_grad:
            return "a gradient is wanted and it has no backward pass"
    return refuses(tensors)


def exceeds_width(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why heads are too wide, of q, k and v or keys alone: a row of each has to fit into the registers of one program."""
    # no `default`: torch.compile cannot trace it
    widest = max([0, *(x.shape[-1] for x in tensors[:3] if x is not None)])
    return f"heads are {widest} wide; it takes up to {MAX_WIDTH}" if widest > MAX_WIDTH else None


def exceeds_groups(tensors: Sequence[Tensor | None]) -> str | None:
    """As `exceeds_width`, and why groups are too large or too many, of queries with their keys, or keys alone."""
    floating = [x for x in tensors if x is not None and x.is_floating_point()]
    if not floating:
        return None
    queries, keys = floating[0], floating[min(1, len(floating) - 1)]
    G = keys.shape[2]
    if queries.shape[0] * G > MAX_GROUPS:
        return f"rows and groups are {queries.shape[0]} x {G}; it takes up to {MAX_GROUPS:,}"
    widths = [x.shape[-1] for x in floating]
    most = tile_rows(max(x.itemsize for x in floating), *widths)
    if queries.shape[2] > most * G:
        return f"{queries.shape[2] // G} heads share a key of {max(widths)} numbers; it takes up to {most}"
    return exceeds_width(floating)


def tile_rows(itemsize: int, *widths: int) -> int:
    """Return how many rows fit into TILE_BYTES, heads of queries or keys: a power of two, as of width 128 where all are narrower."""
    widest = max(128, *widths)
    return TILE_BYTES // (itemsize * (128 if widest <= 128 else MAX_WIDTH))


def exceeds_rows(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why rows are too wide for elementwise work: a program holds one."""
    widest = max([0, *(max(x.shape[-1], math.prod(x.shape[2:])) for x in tensors if x is not None)])
    return f"rows are {widest} wide; it takes up to {MAX_ROW}" if widest > MAX_ROW else None


class Strided(NamedTuple):
    """A tensor of four dimensions as kernels take it: how far apart its numbers are along all but the last, by one."""

    at: Tensor
    row: int
    place: int
    head: int


def strided(x: Tensor) -> Strided:
    """Return a tensor (B, T, H, K) as an argument of a kernel; a copy where a head's numbers are no neighbours, or tokens far apart."""
    x = x if x.stride(3) == 1 and x.stride(1) < MAX_APART else x.contiguous()
    return Strided(x, *x.stride()[:3])


def operator(
    schema: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function that launches kernels the torch operator `sala::name`, which torch.compile sees as one step.

    Args:
        schema: torch's, `name(Tensor q, float scale) -> Tensor`, a tensor first.
        fake: takes the same arguments and returns empty tensors of the right shapes and dtypes.
        setup_context, backward: as `torch.library.register_autograd` takes them; left out, to ask for a gradient raises.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def launch(*arguments: Any) -> Any:
            # Triton launches on the current device, wherever the tensors are
            with torch.cuda.device_of(arguments[0]):
                return function(*arguments)

        name = OPERATORS.define(schema)
        # whatever the device: under the interpreter it is the CPU
        OPERATORS.impl(name, launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sala::{name}", fake, lib=OPERATORS)
        # without any, torch would leave out what passes through it
        derivative = backward or functools.partial(_refuse_gradient, name)
        torch.library.register_autograd(f"sala::{name}", derivative, setup_context=setup_context, lib=OPERATORS)
        seen = getattr(torch.ops.sala, name).default

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            # torch's own way to a function takes as long as a decoding step
            return seen(*arguments) if watched() or _recorded(arguments) else launch(*arguments)

        return call

    return register


def _refuse_gradient(name: str, *_: object) -> None:
    raise BackendError(
        f"{name} has no gradient of its own: backend 'triton' is not differentiated twice here; expected 'reference'"
    )


def _recorded(arguments: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
