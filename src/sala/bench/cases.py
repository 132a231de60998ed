"""The operators' cases: a table of phases, each with its inputs, its work, its cost and its check against the definition."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sala.bench import cost, fla, parity, sdpa
from sala.bench.cost import Cost
from sala.bench.device import Timer
from sala.bench.fla import FLA, lightning_by
from sala.bench.inputs import Inputs
from sala.bench.parity import Parity
from sala.bench.sdpa import Make, Run
from sala.bench.shapes import AttentionShape
from sala.errors import InputError
from sala.ops import dispatch
from sala.ops.dense import dense_attention
from sala.ops.dispatch import BACKENDS
from sala.ops.infllm import infllm_attention, select_blocks
from sala.ops.lightning import lightning_attention


@dataclass(frozen=True, slots=True)
class Work:
    """What one case times: `backend` makes the call of a backend, `sdpa` that of torch's operator."""

    backend: Callable[[str], Run]
    sdpa: Make | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the table.

    cold: whether each call is to find its inputs in memory, as a step of decoding does after all other layers.
    trains: whether gradients are made. rivals: operators of other packages, by their names.
    """

    op: str
    phase: str
    cost: Callable[[AttentionShape, int, int], Cost]
    work: Callable[[Inputs, int], Work]
    parity: Callable[[Inputs, str], list[Parity]]
    cold: bool = False
    correlated: bool = True
    trains: bool = False
    rivals: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op} {self.phase}"

    def competitors(self, device: torch.device) -> tuple[str, ...]:
        """Return what is timed: the backends that would be chosen for tensors on the device, and on a GPU the rivals."""
        rows = BACKENDS[self.op].items()
        rivals = self.rivals if device.type == "cuda" else ()
        return *(name for name, row in rows if row.automatic_on(device.type)), *rivals

    def unavailable(self, name: str) -> str | None:
        """Return why one of them cannot run on this machine, None when it can."""
        return fla.unavailable() if name == FLA else dispatch.unavailable(self.op, name)


def _lightning_prefill(inputs: Inputs, T: int) -> Work:
    q, k, v = inputs.lightning(T)
    decay_H, scale = inputs.log_decay(), q.shape[3] ** -0.5
    return Work(
        lambda name: partial(lightning_by(name), q, k, v, decay_H, scale=scale),
        lambda timer: sdpa.prefill(q, k, v, timer),
    )


def _lightning_training(inputs: Inputs, T: int) -> Work:
    q, k, v = inputs.lightning(T)
    decay_H, scale = inputs.log_decay(), q.shape[3] ** -0.5
    return Work(
        lambda name: _trained(lambda *leaves: lightning_by(name)(*leaves, decay_H, scale=scale)[0], q, k, v),
        lambda timer: sdpa.training(q, k, v, timer),
    )


def _trained(forward: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Run:
    """Return forward and backward as one call."""
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    grad = torch.randn_like(q)

    def run() -> object:
        return torch.autograd.grad(forward(*leaves), leaves, grad)

    return run


def _lightning_step(inputs: Inputs, S: int) -> Work:
    q, k, v = inputs.lightning(1)
    state, decay_H, scale = inputs.state(), inputs.log_decay(), q.shape[3] ** -0.5
    return Work(
        lambda name: lambda: lightning_attention(q, k, v, decay_H, scale=scale, initial_state_BHKV=state, backend=name),
        lambda timer: _sdpa_step(inputs, q, q.shape[2], S, timer),
    )


def _infllm_prefill(inputs: Inputs, T: int) -> Work:
    q, k, v = inputs.attention(T, T)
    geometry, scale = inputs.shape.geometry, inputs.scale
    return Work(
        lambda name: lambda: infllm_attention(q, k, v, None, None, None, geometry, scale=scale, start=0, backend=name),
        lambda timer: sdpa.prefill(q, k, v, timer),
    )


def _infllm_training(inputs: Inputs, T: int) -> Work:
    q, k, v = inputs.attention(T, T)
    geometry, scale = inputs.shape.geometry, inputs.scale

    def forward(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: infllm_attention(q, k, v, None, None, None, geometry, scale=scale, start=0, backend=name)

    return Work(lambda name: _trained(forward(name), q, k, v), lambda timer: sdpa.training(q, k, v, timer))


def _infllm_selection(inputs: Inputs, T: int) -> Work:
    geometry, scale = inputs.shape.geometry, inputs.scale
    first = geometry.first_sparse_position(T - 1)
    if first >= T:
        raise InputError(f"infllm selection at {T:,} tokens: nothing is selected before position {first:,}")
    q, k, _ = inputs.attention(T - first, T)
    tiers, positions_BT = inputs.tiers(k), inputs.positions(first, T)
    return Work(lambda name: lambda: select_blocks(q, *tiers, positions_BT, geometry, scale=scale, backend=name))


def _infllm_step(inputs: Inputs, S: int) -> Work:
    q, k, v = inputs.attention(1, S)
    geometry, scale, tiers = inputs.shape.geometry, inputs.scale, inputs.tiers(k)
    return Work(
        lambda name: lambda: infllm_attention(q, k, v, *tiers, None, geometry, scale=scale, start=S - 1, backend=name),
        lambda timer: _sdpa_step(inputs, q, inputs.shape.groups, S, timer),
    )


def _dense_prefill(inputs: Inputs, T: int) -> Work:
    q, k, v = inputs.attention(T, T)
    return Work(lambda name: lambda: _dense(q, k, v, inputs.scale, 0, name), lambda timer: sdpa.prefill(q, k, v, timer))


def _dense_step(inputs: Inputs, S: int) -> Work:
    q, k, v = inputs.attention(1, S)
    return Work(
        lambda name: lambda: _dense(q, k, v, inputs.scale, S - 1, name),
        lambda timer: _sdpa_step(inputs, q, inputs.shape.groups, S, timer),
    )


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, start: int, backend: str) -> Tensor:
    return dense_attention(q, k, v, None, scale=scale, start=start, backend=backend)


def _sdpa_step(inputs: Inputs, q_B1HK: Tensor, G: int, S: int, timer: Timer) -> sdpa.Sdpa:
    K = q_B1HK.shape[3]
    return sdpa.step(lambda length, groups, which: inputs.draw(length, groups, K, which), q_B1HK, G, S, timer)


CASES: tuple[Case, ...] = (
    Case(
        "lightning",
        "prefill",
        cost.lightning_prefill,
        _lightning_prefill,
        parity.lightning,
        correlated=False,
        rivals=(FLA,),
    ),
    Case(
        "lightning",
        "training",
        cost.lightning_training,
        _lightning_training,
        parity.lightning_training,
        correlated=False,
        trains=True,
        rivals=(FLA,),
    ),
    Case("lightning", "step", cost.lightning_step, _lightning_step, parity.lightning_step, cold=True, correlated=False),
    Case("infllm", "prefill", cost.infllm_prefill, _infllm_prefill, parity.infllm),
    Case("infllm", "training", cost.infllm_training, _infllm_training, parity.infllm_training, trains=True),
    Case("infllm", "selection", cost.infllm_selection, _infllm_selection, parity.infllm),
    Case("infllm", "step", cost.infllm_step, _infllm_step, parity.infllm_step, cold=True),
    Case("dense", "prefill", cost.dense_prefill, _dense_prefill, parity.dense, correlated=False),
    Case("dense", "step", cost.dense_step, _dense_step, parity.dense_step, cold=True, correlated=False),
)
