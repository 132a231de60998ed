"""Functions of the library as torch operators, which torch.compile and torch.export see as one step each."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sala.ops.native.tape import recording

DTYPES = (torch.float32, torch.bfloat16)

# kept for the life of the process: torch forgets the operators with it
OPERATORS = torch.library.Library("sala", "DEF")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function on CPU tensors the torch operator `sala::name`.

    Args:
        schema: torch's, `name(Tensor q, float scale) -> Tensor`.
        fake: takes the same arguments and returns empty tensors of the right shapes and dtypes.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = OPERATORS.define(schema)
        OPERATORS.impl(name, function, "CPU")
        torch.library.register_fake(f"sala::{name}", fake, lib=OPERATORS)
        seen = getattr(torch.ops.sala, name).default

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            # torch's own way to a function takes as long as a small operator
            return seen(*arguments) if watched() else function(*arguments)

        return call

    return register


def watched() -> bool:
    """Return whether someone needs to see operators: a compiler, a tracer, a mode over tensors, a profiler."""
    if recording() is not None:
        return False
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()
        or torch.autograd._profiler_enabled()
    )


def transformed() -> bool:
    """Return whether a transform of torch.func (grad, vmap) is at work, whose tensors have no address."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def mapped() -> bool:
    """Return whether vmap is at work: a tensor stands for many."""
    return transformed() and any(
        transform.key() == torch._C._functorch.TransformType.Vmap
        for transform in torch._C._functorch.get_interpreter_stack()
    )


def refuses(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why the library does not take these tensors, None when it does."""
    recording = torch.is_grad_enabled()
    if transformed():
        return "a transform of torch.func is at work"
    for tensor in tensors:
        if tensor is None:
            continue
        if not tensor.is_cpu:
            return f"a tensor is on {tensor.device}, not on the CPU"
        if tensor.dtype not in DTYPES and tensor.is_floating_point():
            return f"a tensor is {tensor.dtype}; it takes float32 and bfloat16"
        if recording and tensor.requires_grad:
            return "a gradient is wanted and it has no backward pass"
    return None


def refuses_mixed(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why the library does not take these tensors, where it takes one dtype only; None when it does."""
    first = tensors[0].dtype if tensors and tensors[0] is not None else None
    for tensor in tensors:
        if tensor is not None and tensor.dtype != first:
            return f"tensors are {first} and {tensor.dtype}; it takes one dtype"
    return refuses(tensors)


# a linear map of more is a product of matrices, and torch's own is the faster one
FEW_ROWS = 8


def refuses_many_rows(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why the library does not take a linear map's x, weight and bias, None when it does."""
    x = tensors[0] if tensors else None
    if x is not None and x.numel() > FEW_ROWS * x.shape[-1]:
        return f"x has {x.numel() // x.shape[-1]} rows; it takes at most {FEW_ROWS}"
    if torch.is_autocast_enabled("cpu"):
        return "under autocast torch chooses the dtype of a product"
    # such as the packed weights of a quantiser, which bring a product of their own
    other = next((t for t in tensors if t is not None and type(t) not in (Tensor, torch.nn.Parameter)), None)
    if other is not None:
        return f"a tensor is a {type(other).__name__}; it takes plain tensors"
    return refuses_mixed(tensors)
