"""Functions of the library as torch operators, which torch.compile and torch.export see as one step each."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)

# kept for the life of the process: torch forgets the operators with it
_operators = torch.library.Library("sala", "DEF")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function on CPU tensors the torch operator `sala::name`.

    Args:
        schema: torch's, `name(Tensor q, float scale) -> Tensor`.
        fake: takes the same arguments and returns empty tensors of the right shapes and dtypes.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = _operators.define(schema)
        _operators.impl(name, function, "CPU")
        torch.library.register_fake(f"sala::{name}", fake, lib=_operators)
        return getattr(torch.ops.sala, name).default

    return register


def refuses(tensors: Sequence[Tensor | None]) -> str | None:
    """Return why the library does not take these tensors, None when it does."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}, not on the CPU"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"a tensor is {tensor.dtype}; it takes float32 and bfloat16"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "a gradient is wanted and it has no backward pass"
    return None
