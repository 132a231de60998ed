"""Which implementation of an operator runs: the table of backends, and the choice among them."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType, ModuleType

from torch import Tensor

from sala.errors import BackendError, nearest
from sala.ops import native


def _never(*_: object) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of an operator: where it lives, why one would run it, and what keeps it from running.

    details: returns more of the reason, that only this machine knows.
    unavailable: returns why this machine cannot run it, or None.
    refuses: takes a call's tensors and returns why it does not take them, or None.
    """

    module: str
    reason: str
    # the definition is for tests and for doubt: correct, slow, and never what a user wants by default
    automatic: bool = True
    details: Callable[[], str | None] = _never
    unavailable: Callable[[], str | None] = _never
    refuses: Callable[[Sequence[Tensor | None]], str | None] = _never


def _rows(op: str, refuses: Callable[[Sequence[Tensor | None]], str | None] = native.refuses) -> Mapping[str, Backend]:
    return MappingProxyType(
        {
            "cpu": Backend(
                f"sala.ops.{op}.cpu",
                "the fastest on a CPU, without gradients",
                details=native.describe,
                unavailable=native.unavailable,
                refuses=refuses,
            ),
            "eager": Backend(f"sala.ops.{op}.eager", "plain torch: differentiable, on every device"),
            "reference": Backend(
                f"sala.ops.{op}.reference", "the definition: token by token in float64", automatic=False
            ),
        }
    )


# a row's key is the backend's file, its `backend=` value and its test id; the best stands first
BACKENDS: Mapping[str, Mapping[str, Backend]] = MappingProxyType(
    {
        "lightning": _rows("lightning"),
        "infllm": _rows("infllm"),
        "dense": _rows("dense"),
        # plain torch promotes where dtypes differ, as with norms kept in float32
        "pointwise": _rows("pointwise", native.refuses_mixed),
    }
)


def explain(op: str) -> tuple[str, str]:
    """Return the backend that `backend="auto"` runs for `op` on CPU tensors without gradients, and the reason in words.

    The reason says too why a better one cannot run on this machine.
    """
    passed_over: list[str] = []
    for name, row in BACKENDS[op].items():
        if row.automatic:
            why_not = row.unavailable()
            if why_not is None:
                return name, "; ".join(filter(None, [row.reason, row.details(), *passed_over]))
            passed_over.append(f"{name} cannot run here: {why_not}")
    raise BackendError(f"{op} has no backend for this machine: {'; '.join(passed_over)}")


def unavailable(op: str, backend: str) -> str | None:
    """Return why `backend` of `op` cannot run on this machine, None when it can."""
    return BACKENDS[op][backend].unavailable()


def choose(op: str, backend: str = "auto", tensors: Sequence[Tensor | None] = ()) -> ModuleType:
    """Return the module that implements `op` for these tensors: the best automatic one for "auto", else the one named.

    Raises:
        BackendError: no backend of that name (the message names those there are, and the nearest), or the one named
            cannot run on this machine or on these tensors.
    """
    rows = BACKENDS[op]
    if backend == "auto":
        row = next(r for r in rows.values() if r.automatic and not r.refuses(tensors) and not r.unavailable())
    elif backend in rows:
        row = rows[backend]
        why_not = row.refuses(tensors) or row.unavailable()
        if why_not:
            raise BackendError(f"{op}: backend {backend!r} cannot run: {why_not}")
    else:
        known = ("auto", *rows)
        raise BackendError(f"{op} has no backend {backend!r}; it has {', '.join(known)}{nearest(str(backend), known)}")
    # torch.compile can trace a look-up, not an import
    return sys.modules[row.module] if row.module in sys.modules else import_module(row.module)
