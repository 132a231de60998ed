"""Operators under autocast: they say themselves what is computed in float32, which autocast would round."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_written(x: Tensor) -> AbstractContextManager[None]:
    """Return a context in which nothing casts products of tensors on the device of `x`."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if casts else nullcontext()
