"""A GPU that need not be there: tensors have shapes only, and what passes between it and the CPU is noted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sala.ops import dispatch, gpu

CARD = torch.device("meta")


class Card(TorchDispatchMode):
    """Notes what is launched on the card, and how many bytes are sent to it; to ask it for a number raises."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []
        self.launched: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.device == CARD for x in (*given, *tree_leaves(result)) if isinstance(x, Tensor)):
            self.launched.append(function.name())
            self.sent += [x.nbytes for x in given if x.device != CARD]
        return result


def choose_for_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the operators choose for tensors on `CARD` what they would on a GPU."""
    monkeypatch.setattr(gpu, "device_type", lambda: CARD.type)
    monkeypatch.setattr(gpu, "_unavailable", lambda interpreted: None)
    rows = {
        op: MappingProxyType(
            {name: replace(row, devices=(CARD.type,)) if name == "triton" else row for name, row in rows.items()}
        )
        for op, rows in dispatch.BACKENDS.items()
    }
    monkeypatch.setattr(dispatch, "BACKENDS", MappingProxyType(rows))


@contextmanager
def absent_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """Choose for tensors on `CARD` what would run on a GPU, and see what passes between it and the CPU."""
    choose_for_card(monkeypatch)
    # made from numbers on the CPU, which torch does not say of shapes alone
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, _on_the_cpu_first(getattr(torch, name)))
    with Card() as card:
        yield card


def _on_the_cpu_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        tensor = make(data, device=None if device in (CARD, CARD.type) else device, **options)
        return tensor if device is None else tensor.to(device)

    return made
