"""Which implementation of an operator runs: the table of backends, and the choice among them."""

import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType, ModuleType

import torch
from torch import Tensor

from sala.errors import BackendError, nearest
from sala.ops import gpu, native

logger = logging.getLogger("sala")


def _never(*_: object) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of an operator: where it lives, why one would run it, and what keeps it from running.

    devices: the types of device on whose tensors it may be chosen for the user; None: any.
    details: returns more of the reason, that only this machine knows.
    unavailable: returns why this machine cannot run it, or None.
    refuses: takes a call's tensors and returns why it does not take them, or None: by their kind, as a matter of course.
    exceeds: likewise, by their sizes; said once where it would have been chosen for the user.
    fusible: a compiler makes more of plain torch, and gets it instead where the choice is not the user's.
    features: what its functions take beyond what every backend does: "pages" (page_table_BP), "slots" (slots_2B).
    """

    module: str
    reason: str
    devices: tuple[str, ...] | None = None
    details: Callable[[], str | None] = _never
    unavailable: Callable[[], str | None] = _never
    refuses: Callable[[Sequence[Tensor | None]], str | None] = _never
    exceeds: Callable[[Sequence[Tensor | None]], str | None] = _never
    fusible: bool = False
    features: frozenset[str] = frozenset()

    def automatic_on(self, device: str) -> bool:
        if self.fusible and torch.compiler.is_compiling():
            return False
        return self.devices is None or device in self.devices


Refuses = Callable[[Sequence[Tensor | None]], str | None]


def _rows(
    op: str,
    refuses: Refuses = native.refuses,
    triton_refuses: Refuses | None = None,
    triton_exceeds: Refuses = _never,
    fusible: bool = False,
    features: Mapping[str, str] = MappingProxyType({}),
) -> Mapping[str, Backend]:
    """Return the backends of an operator; one in Triton where it is said what that does not take."""
    triton = Backend(
        f"sala.ops.{op}.triton",
        "kernels for GPUs",
        # under the interpreter it takes tensors on the CPU, and nobody wants it there
        devices=("cuda",),
        details=gpu.describe,
        unavailable=gpu.unavailable,
        refuses=triton_refuses or _never,
        exceeds=triton_exceeds,
        fusible=fusible,
        features=frozenset(features.get("triton", "").split()),
    )
    return MappingProxyType(
        {
            "cpu": Backend(
                f"sala.ops.{op}.cpu",
                "the fastest on a CPU, without gradients",
                devices=("cpu",),
                details=native.describe,
                unavailable=native.unavailable,
                refuses=refuses,
                features=frozenset(features.get("cpu", "").split()),
            ),
            **({"triton": triton} if triton_refuses else {}),
            "eager": Backend(f"sala.ops.{op}.eager", "plain torch: differentiable, on every device"),
            # for tests and for doubt: correct, slow, and never what a user wants by default
            "reference": Backend(f"sala.ops.{op}.reference", "the definition: token by token in float64", devices=()),
        }
    )


# a row's key is the backend's file, its `backend=` value and its test id; the best stands first
BACKENDS: Mapping[str, Mapping[str, Backend]] = MappingProxyType(
    {
        "lightning": _rows(
            "lightning",
            triton_refuses=gpu.refuses_states,
            triton_exceeds=gpu.exceeds_width,
            features={"cpu": "slots"},
        ),
        "infllm": _rows(
            "infllm",
            triton_refuses=gpu.refuses,
            triton_exceeds=gpu.exceeds_groups,
            features={"cpu": "pages", "triton": "pages"},
        ),
        "dense": _rows("dense", features={"cpu": "pages"}),
        "linear": _rows("linear", native.refuses_many_rows, fusible=True),
        "quantized": _rows("quantized", native.refuses_mixed, gpu.refuses_rows),
        # plain torch promotes where dtypes differ, as with norms kept in float32. On a GPU torch.compile makes one kernel of
        # it and of what stands beside it, over the edges of our functions and with gradients; a kernel of ours would cut
        # its graph there
        "pointwise": _rows("pointwise", native.refuses_mixed, gpu.refuses_rows, gpu.exceeds_rows, fusible=True),
    }
)


def explain(op: str, device: str = "cpu") -> tuple[str, str]:
    """Return the backend that `backend="auto"` runs for `op` on tensors without gradients on this type of device, and why.

    The reason says too why a better one cannot run on this machine.
    """
    passed_over: list[str] = []
    for name, row in BACKENDS[op].items():
        if row.automatic_on(device):
            why_not = row.unavailable()
            if why_not is None:
                return name, "; ".join(filter(None, [row.reason, row.details(), *passed_over]))
            passed_over.append(f"{name} cannot run here: {why_not}")
    raise BackendError(f"{op} has no backend for this machine: {'; '.join(passed_over)}")


def unavailable(op: str, backend: str) -> str | None:
    """Return why `backend` of `op` cannot run on this machine, None when it can."""
    return BACKENDS[op][backend].unavailable()


def takes(op: str, implementation: ModuleType, feature: str) -> bool:
    """Return whether what `choose` returned has a feature of `Backend.features`."""
    return feature in BACKENDS[op][implementation.__name__.rpartition(".")[2]].features


def choose(op: str, backend: str = "auto", tensors: Sequence[Tensor | None] = ()) -> ModuleType:
    """Return the module that implements `op` for these tensors: the best automatic one for "auto", else the one named.

    Raises:
        BackendError: no backend of that name (the message names those there are, and the nearest), or the one named
            cannot run on this machine or on these tensors.
    """
    rows = BACKENDS[op]
    if backend == "auto":
        device = next((tensor.device.type for tensor in tensors if tensor is not None), "cpu")
        row = next(
            row
            for name, row in rows.items()
            if row.automatic_on(device)
            and not row.refuses(tensors)
            and not row.unavailable()
            and not _too_large(op, name, row.exceeds(tensors))
        )
    elif backend in rows:
        row = rows[backend]
        why_not = row.refuses(tensors) or row.exceeds(tensors) or row.unavailable()
        if why_not:
            raise BackendError(f"{op}: backend {backend!r} cannot run: {why_not}")
    else:
        known = ("auto", *rows)
        raise BackendError(f"{op} has no backend {backend!r}; it has {', '.join(known)}{nearest(str(backend), known)}")
    _import(row.module)
    # not from sys.modules: of what is imported since it looked there first, torch.compile knows nothing
    package, _, name = row.module.rpartition(".")
    return getattr(sys.modules[package], name)


def _too_large(op: str, backend: str, why: str | None) -> bool:
    return why is not None and _said(op, backend, why)


# torch.compile takes the answer as it is: a log cannot be traced
@torch.compiler.assume_constant_result
def _said(op: str, backend: str, why: str) -> bool:
    _say(op, backend, why)
    return True


@functools.cache
def _say(op: str, backend: str, why: str) -> None:
    logger.warning("%s: backend %r is not used: %s; plain torch runs, slower", op, backend, why)


# torch.compile cannot trace an import, and takes its result as it is; what follows are look-ups
@torch.compiler.assume_constant_result
def _import(module: str) -> bool:
    # sys.modules would have it too while another thread is still running it
    return bool(import_module(module))
