"""Numbers that a configuration fixes, on the device that computes with them."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sala.ops.native.operator import OPERATORS, watched


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return `values` as float32 (N,) on the device: one tensor for all who ask, sent there once, never to be written to.

    A copy to a GPU from ordinary memory waits for all the work before it, and a CUDA graph cannot hold one.
    """
    return torch.ops.sala.constant.default(values, device) if watched() else _sent(values, device)


@cache
def _sent(values: tuple[float, ...], device: torch.device) -> Tensor:
    # for training too, whoever asked first
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def _copied(values: Sequence[float], device: torch.device) -> Tensor:
    # a compiler takes an operator's result for its own, and may write to that memory later
    return _sent(tuple(values), device).clone()


def _empty(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.empty(len(values), dtype=torch.float32, device=device)


OPERATORS.define("constant(float[] values, Device device) -> Tensor")
OPERATORS.impl("constant", _copied, "CompositeExplicitAutograd")
torch.library.register_fake("sala::constant", _empty, lib=OPERATORS)
