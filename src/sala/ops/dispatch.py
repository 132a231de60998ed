"""Which implementation of an operator runs: the table of backends, and the choice among them."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType, ModuleType

from sala.errors import BackendError, nearest


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of an operator: where it lives and why one would run it."""

    module: str
    reason: str
    # the definition is for tests and for doubt: correct, slow, and never what a user wants by default
    automatic: bool = True


def _rows(op: str) -> Mapping[str, Backend]:
    return MappingProxyType(
        {
            "eager": Backend(f"sala.ops.{op}.eager", "plain torch: differentiable, on every device"),
            "reference": Backend(
                f"sala.ops.{op}.reference", "the definition: token by token in float64", automatic=False
            ),
        }
    )


# a row's key is the backend's file, its `backend=` value and its test id; the best stands first
BACKENDS: Mapping[str, Mapping[str, Backend]] = MappingProxyType({op: _rows(op) for op in ("lightning", "infllm")})


def explain(op: str) -> tuple[str, str]:
    """Return the name of the backend that `backend="auto"` runs for `op`, and the reason in words."""
    name, row = next((name, row) for name, row in BACKENDS[op].items() if row.automatic)
    return name, row.reason


def choose(op: str, backend: str = "auto") -> ModuleType:
    """Return the module that implements `op`: the best automatic one for "auto", else the one named.

    Raises:
        BackendError: no backend of that name; the message names those there are, and the nearest.
    """
    rows = BACKENDS[op]
    name = explain(op)[0] if backend == "auto" else backend
    if name not in rows:
        known = ("auto", *rows)
        raise BackendError(f"{op} has no backend {backend!r}; it has {', '.join(known)}{nearest(str(backend), known)}")
    module = rows[name].module
    # torch.compile can trace a look-up, not an import
    return sys.modules[module] if module in sys.modules else import_module(module)
