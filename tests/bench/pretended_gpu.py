"""A GPU that is the CPU: torch puts its tensors there, and `torch.cuda` answers as a card would."""

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
NAME = "NVIDIA H200"


class OnTheCpu(TorchFunctionMode):
    """Makes and moves tensors on the CPU where a GPU was asked for."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.device:
            args = tuple(_moved(x) for x in args)
            kwargs = {name: _moved(x) for name, x in kwargs.items()}
        return function(*args, **kwargs)


class Event:
    """An event of a device that has done everything at once."""

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.moment = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Event") -> float:
        return (other.moment - self.moment) * 1e3


class Generator:
    def __new__(cls, device: Any = "cpu") -> Any:
        return _GENERATOR("cpu")


_GENERATOR = torch.Generator


def _moved(x: Any) -> Any:
    return CPU if isinstance(x, torch.device) and x.type == "cuda" else x


def pretend(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have a GPU until the test ends; return a list that grows by what it is told."""
    told: list[str] = []
    card = SimpleNamespace(
        name=NAME, total_memory=2**37, major=9, minor=0, multi_processor_count=132, L2_cache_size=6 * 2**20
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "memory_allocated": 1000,
        "max_memory_allocated": 5000,
        "mem_get_info": (2**37, 2**37),
        "get_device_name": NAME,
        "get_device_properties": card,
        "current_device": 0,
        "device_count": 1,
        "device_of": nullcontext(),
    }
    for name in ("_sleep", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: told.append(name))
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "Generator", Generator)
    return told
