"""Numbers that a configuration fixes, on the device that computes with them."""

from functools import cache

import torch
from torch import Tensor


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return `values` as float32 (N,) on the device: one tensor for all who ask, sent there once, never to be written to.

    A copy to a GPU from ordinary memory waits for all the work before it, and a CUDA graph cannot hold one.
    """
    if torch.compiler.is_compiling():
        # a graph holds the tensor as it is, but torch.compile cannot carry it over a break of its graph; a view it can
        return _held(values, device).view(-1)
    return _held(values, device)


@torch.compiler.assume_constant_result
def _held(values: tuple[float, ...], device: torch.device) -> Tensor:
    if torch._C._len_torch_dispatch_stack() > 0:
        # what a tracer sees is its own
        return torch.tensor(values, dtype=torch.float32, device=device)
    return _sent(values, device)


@cache
def _sent(values: tuple[float, ...], device: torch.device) -> Tensor:
    # for training too, whoever asked first
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)
