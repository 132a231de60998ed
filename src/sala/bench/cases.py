"""The operators' cases: a table of phases, each with its inputs, its work, its cost and its check against the definition."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from sala.bench import cost, fla, sdpa
from sala.bench.cost import Cost
from sala.bench.device import CPU, Timer
from sala.bench.fla import FLA
from sala.bench.sdpa import Make, Run
from sala.bench.shapes import AttentionShape
from sala.errors import InputError
from sala.ops import dispatch
from sala.ops.dense import dense_attention
from sala.ops.dispatch import BACKENDS
from sala.ops.infllm import compress, infllm_attention, select_blocks
from sala.ops.lightning import lightning_attention, log_decay

# share of a token that is its predecessor's: neighbours choose much the same blocks, as in text
CORRELATION = 0.9
# relative to the largest number of the expected output; the values of tests/tolerances.py
TOLERANCES: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
)
# share of the selected blocks that may be others than the definition's: scores that nearly tie fall either way
PICK_TOLERANCES: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
)
# a prompt's chunk in the parity check of the two softmax operators: more than one tile of any kernel, no whole number of them
PARITY_CHUNK = 258
# how many of its queries the definition, which is slow, computes
PARITY_QUERIES = 12
PARITY_LIGHTNING_TOKENS = 1154
PARITY_STEPS = 5

# of a gradient: four chunks and a piece, each of whose states the definition keeps
PARITY_TRAINING_TOKENS = 258


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where a case's random numbers come from: drawn on the device, whose generators give each its own."""

    shape: AttentionShape
    dtype: torch.dtype
    correlated: bool = True
    seed: int = 0
    device: torch.device = CPU

    def draw(self, T: int, heads: int, width: int, which: int) -> Tensor:
        """Return (1, T, heads, width), standard normal; along T a random walk with memory where `correlated`.

        which: queries, keys and values of one length differ in it.
        """
        generator = torch.Generator(self.device).manual_seed(1000 * self.seed + which)
        drawn = torch.empty(1, T, heads, width, dtype=self.dtype, device=self.device)
        for head in range(heads):
            noise_TK = torch.randn(T, width, generator=generator, device=self.device)
            if self.correlated:
                # x_t = a x_(t-1) + noise, by doubling: the terms older than 128 tokens, below 2e-6, are left out
                for shift in (1, 2, 4, 8, 16, 32, 64):
                    noise_TK[shift:] += CORRELATION**shift * noise_TK[:-shift].clone() if shift < T else 0
                noise_TK *= (1 - CORRELATION**2) ** 0.5
            drawn[0, :, head] = noise_TK
        return drawn

    def attention(self, T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (1, T, H, K), k and v (1, S, G, K)."""
        shape = self.shape
        return (
            self.draw(T, shape.heads, shape.width, 1),
            self.draw(S, shape.groups, shape.width, 2),
            self.draw(S, shape.groups, shape.width, 3),
        )

    def lightning(self, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v (1, T, H, K)."""
        heads, width = self.shape.lightning_heads, self.shape.lightning_width
        q, k, v = (self.draw(T, heads, width, which) for which in (1, 2, 3))
        return q, k, v

    def state(self) -> Tensor:
        heads, width = self.shape.lightning_heads, self.shape.lightning_width
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(1, heads, width, width, generator=generator, device=self.device)

    def log_decay(self) -> Tensor:
        return log_decay(self.shape.lightning_heads).to(self.device)

    def positions(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self.device)[None]

    def tiers(self, k_BSGK: Tensor) -> tuple[Tensor, Tensor]:
        geometry = self.shape.geometry
        return (
            compress(k_BSGK, geometry.kernel_size, geometry.kernel_stride),
            compress(k_BSGK, geometry.coarse_size, geometry.coarse_stride),
        )


@dataclass(frozen=True, slots=True)
class Work:
    """What one case times: `backend` makes the call of a backend, `sdpa` that of torch's operator."""

    backend: Callable[[str], Run]
    sdpa: Make | None = None


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a backend is from the definition: the largest difference over the largest number, or a share of blocks."""

    error: float
    tolerance: float
    against: str

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # also False for NaN


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


# work


def _scale(inputs: Inputs) -> float:
    return inputs.shape.width**-0.5


def _lightning(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return fla.attend if name == FLA else partial(lightning_attention, backend=name)


def _lightning_prefill(inputs: Inputs, T: int) -> Work:
    q, k, v = inputs.lightning(T)
    decay_H, scale = inputs.log_decay(), q.shape[3] ** -0.5
    return Work(
        lambda name: partial(_lightning(name), q, k, v, decay_H, scale=scale),
        lambda timer: sdpa.prefill(q, k, v, timer),
    )


def _lightning_training(inputs: Inputs, T: int) -> Work:
    q, k, v = inputs.lightning(T)
    decay_H, scale = inputs.log_decay(), q.shape[3] ** -0.5
    return Work(
        lambda name: _trained(lambda *leaves: _lightning(name)(*leaves, decay_H, scale=scale)[0], q, k, v),
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
    geometry, scale = inputs.shape.geometry, _scale(inputs)
    return Work(
        lambda name: lambda: infllm_attention(q, k, v, None, None, None, geometry, scale=scale, start=0, backend=name),
        lambda timer: sdpa.prefill(q, k, v, timer),
    )


def _infllm_training(inputs: Inputs, T: int) -> Work:
    q, k, v = inputs.attention(T, T)
    geometry, scale = inputs.shape.geometry, _scale(inputs)

    def forward(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: infllm_attention(q, k, v, None, None, None, geometry, scale=scale, start=0, backend=name)

    return Work(lambda name: _trained(forward(name), q, k, v), lambda timer: sdpa.training(q, k, v, timer))


def _infllm_selection(inputs: Inputs, T: int) -> Work:
    geometry, scale = inputs.shape.geometry, _scale(inputs)
    first = geometry.first_sparse_position(T - 1)
    if first >= T:
        raise InputError(f"infllm selection at {T:,} tokens: nothing is selected before position {first:,}")
    q, k, _ = inputs.attention(T - first, T)
    tiers, positions_BT = inputs.tiers(k), inputs.positions(first, T)
    return Work(lambda name: lambda: select_blocks(q, *tiers, positions_BT, geometry, scale=scale, backend=name))


def _infllm_step(inputs: Inputs, S: int) -> Work:
    q, k, v = inputs.attention(1, S)
    geometry, scale, tiers = inputs.shape.geometry, _scale(inputs), inputs.tiers(k)
    return Work(
        lambda name: lambda: infllm_attention(q, k, v, *tiers, None, geometry, scale=scale, start=S - 1, backend=name),
        lambda timer: _sdpa_step(inputs, q, inputs.shape.groups, S, timer),
    )


def _dense_prefill(inputs: Inputs, T: int) -> Work:
    q, k, v = inputs.attention(T, T)
    return Work(
        lambda name: lambda: _dense(q, k, v, _scale(inputs), 0, name), lambda timer: sdpa.prefill(q, k, v, timer)
    )


def _dense_step(inputs: Inputs, S: int) -> Work:
    q, k, v = inputs.attention(1, S)
    return Work(
        lambda name: lambda: _dense(q, k, v, _scale(inputs), S - 1, name),
        lambda timer: _sdpa_step(inputs, q, inputs.shape.groups, S, timer),
    )


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, start: int, backend: str) -> Tensor:
    return dense_attention(q, k, v, None, scale=scale, start=start, backend=backend)


def _sdpa_step(inputs: Inputs, q_B1HK: Tensor, G: int, S: int, timer: Timer) -> sdpa.Sdpa:
    K = q_B1HK.shape[3]
    return sdpa.step(lambda length, groups, which: inputs.draw(length, groups, K, which), q_B1HK, G, S, timer)


# parity


def _difference(actual: Tensor, expected: Tensor, dtype: torch.dtype, against: str) -> Parity:
    largest = max(expected.abs().max().item(), 1e-30)
    error = (actual.double() - expected).abs().max().item() / largest
    return Parity(error, TOLERANCES[dtype], against)


def _lightning_parity(
    inputs: Inputs, backend: str, lengths: Sequence[int] = (PARITY_LIGHTNING_TOKENS,)
) -> list[Parity]:
    """A whole number of chunks and a piece, from a state that is not zero; output and state."""
    T, checks = sum(lengths), []
    q, k, v = inputs.lightning(T)
    state, wanted_state = inputs.state(), inputs.state().double()
    decay_H, scale = inputs.log_decay(), q.shape[3] ** -0.5
    for part in torch.arange(T).split(list(lengths)):
        now = slice(int(part[0]), int(part[-1]) + 1)
        q_n, k_n, v_n = q[:, now], k[:, now], v[:, now]
        out, state = _lightning(backend)(q_n, k_n, v_n, decay_H, scale=scale, initial_state_BHKV=state)
        wanted, wanted_state = lightning_attention(
            q_n.double(),
            k_n.double(),
            v_n.double(),
            decay_H,
            scale=scale,
            initial_state_BHKV=wanted_state,
            backend="reference",
        )
        checks.append(_difference(out, wanted, inputs.dtype, f"reference, token {now.stop} of {T}, output"))
        checks.append(_difference(state, wanted_state, inputs.dtype, f"reference, token {now.stop} of {T}, state"))
    return checks


def _lightning_training_parity(inputs: Inputs, backend: str) -> list[Parity]:
    """Gradients of a random part of the output."""
    q, k, v = inputs.lightning(PARITY_TRAINING_TOKENS)
    decay_H, scale = inputs.log_decay(), q.shape[3] ** -0.5
    grad = torch.randn_like(q)

    def gradients(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, _ = _lightning(name)(*leaves, decay_H, scale=scale)
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))

    return [
        _difference(found, wanted, inputs.dtype, f"reference, {q.shape[1]} tokens, gradient of {name}")
        for name, found, wanted in zip(
            "qkv", gradients(backend, q, k, v), gradients("reference", *(x.double() for x in (q, k, v))), strict=True
        )
    ]


def _lightning_step_parity(inputs: Inputs, backend: str) -> list[Parity]:
    return _lightning_parity(inputs, backend, [1] * PARITY_STEPS)


def _infllm_parity(inputs: Inputs, backend: str, T: int = PARITY_CHUNK) -> list[Parity]:
    """Two chunks, some of their queries against the definition: one over the border of dense and sparse, one far behind.

    The table of blocks is compared first. A query with another table than the definition's, within the tolerance of
    nearly equal scores, has another output too: it is compared with attention over its own table.
    """
    first_sparse = inputs.shape.geometry.first_sparse_position(2**40)
    starts = (max(0, first_sparse - T // 2), 2 * first_sparse + 5)
    return [found for start in starts for found in _infllm_chunk_parity(inputs, backend, T, start, first_sparse)]


def _infllm_chunk_parity(inputs: Inputs, backend: str, T: int, start: int, first_sparse: int) -> list[Parity]:
    geometry, scale = inputs.shape.geometry, _scale(inputs)
    q, k, v = inputs.attention(T, start + T)
    k1, k2 = inputs.tiers(k)
    picks = torch.linspace(0, T - 1, min(T, PARITY_QUERIES)).round().long().to(inputs.device)
    positions_BT = inputs.positions(start, start + T)
    table = select_blocks(q, k1, k2, positions_BT, geometry, scale=scale, backend=backend)[:, picks]
    out = infllm_attention(q, k, v, k1, k2, None, geometry, scale=scale, start=start, backend=backend)[:, picks]
    q, positions_BT = q[:, picks].double(), positions_BT[:, picks]
    k, v, k1, k2 = (x.double() for x in (k, v, k1, k2))
    wanted = _definition_selects(q, k1, k2, positions_BT, inputs)
    # what a dense query would select is not looked at
    table = torch.where((positions_BT < first_sparse)[..., None, None], wanted, table)
    expected = _attend_table(q, k, v, table, positions_BT, geometry.block_size, scale, first_sparse)
    against = f"reference, {len(picks)} of {T} queries from position {start:,} on"
    return [
        _picks(table, wanted, inputs.dtype, f"{against}, selection"),
        _difference(out, expected, inputs.dtype, f"{against}, output"),
    ]


def _definition_selects(q: Tensor, k1: Tensor, k2: Tensor, positions_BT: Tensor, inputs: Inputs) -> Tensor:
    """Return the definition's table; on the CPU, for it looks at every number by itself."""
    q, k1, k2, positions_BT = (x.cpu() for x in (q, k1, k2, positions_BT))
    scale = _scale(inputs)
    table = select_blocks(q, k1, k2, positions_BT, inputs.shape.geometry, scale=scale, backend="reference")
    return table.to(inputs.device)


def _infllm_training_parity(inputs: Inputs, backend: str) -> list[Parity]:
    """Gradients of some queries' output, over the border of dense and sparse and behind it, over the backend's own table."""
    geometry, scale = inputs.shape.geometry, _scale(inputs)
    first_sparse = geometry.first_sparse_position(2**40)
    T = first_sparse + PARITY_CHUNK
    q, k, v = (x.requires_grad_() for x in inputs.attention(T, T))
    picks = torch.linspace(max(0, T - 2 * PARITY_CHUNK), T - 1, PARITY_QUERIES).round().long().to(inputs.device)
    positions_BT = inputs.positions(0, T)
    out = infllm_attention(q, k, v, None, None, None, geometry, scale=scale, start=0, backend=backend)
    grad = torch.zeros_like(out)
    grad[:, picks] = torch.randn_like(grad[:, picks])
    found = torch.autograd.grad(out, (q, k, v), grad)
    last = T - PARITY_CHUNK
    table = picks.new_full((1, T, inputs.shape.groups, geometry.num_selected), -1, dtype=torch.int32)
    table[:, last:] = select_blocks(
        q[:, last:], *inputs.tiers(k.detach()), positions_BT[:, last:], geometry, scale=scale, backend=backend
    )
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    expected = _attend_table(
        q[:, picks], k, v, table[:, picks], positions_BT[:, picks], geometry.block_size, scale, first_sparse
    )
    wanted = torch.autograd.grad(expected, (q, k, v), grad[:, picks].double())
    against = f"float64 over its own blocks, {len(picks)} of {T:,} queries, gradient of"
    return [
        _difference(one, two, inputs.dtype, f"{against} {name}")
        for name, one, two in zip("qkv", found, wanted, strict=True)
    ]


def _infllm_step_parity(inputs: Inputs, backend: str) -> list[Parity]:
    return _infllm_parity(inputs, backend, T=1)


def _picks(table_BTGN: Tensor, wanted_BTGN: Tensor, dtype: torch.dtype, against: str) -> Parity:
    """Compare as sets: the share of the definition's blocks that are not in the table."""
    found = (wanted_BTGN[..., :, None] == table_BTGN[..., None, :]).any(-1) | (wanted_BTGN < 0)
    return Parity(1 - found.double().mean().item(), PICK_TOLERANCES[dtype], against)


def _attend_table(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    table_BTGN: Tensor,
    positions_BT: Tensor,
    block_size: int,
    scale: float,
    first_sparse: int,
) -> Tensor:
    """Return (B, T, H, V): softmax attention over the blocks of the table, over everything below `first_sparse`."""
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    token_S = torch.arange(S, device=k_BSGK.device)
    seen_BTGS = (table_BTGN[..., None, :] == (token_S // block_size)[:, None]).any(-1)
    seen_BTGS |= (positions_BT < first_sparse)[..., None, None]
    seen_BTGS &= (token_S <= positions_BT[..., None])[:, :, None]
    scores_BTGHS = torch.einsum("btghk,bsgk->btghs", q_BTHK.view(B, T, G, H // G, K), k_BSGK) * scale
    probs_BTGHS = scores_BTGHS.masked_fill(~seen_BTGS[:, :, :, None], -torch.inf).softmax(-1)
    return torch.einsum("btghs,bsgv->btghv", probs_BTGHS, v_BSGK).flatten(2, 3)


def _dense_parity(inputs: Inputs, backend: str, T: int = PARITY_CHUNK) -> list[Parity]:
    """From the start of a sequence, and as a later chunk of one; against the same in float64."""
    checks = []
    for start in (0, PARITY_CHUNK + 1):
        q, k, v = inputs.attention(T, start + T)
        out = _dense(q, k, v, _scale(inputs), start, backend)
        expected = dense_attention(q.double(), k.double(), v.double(), None, scale=_scale(inputs), start=start)
        checks.append(_difference(out, expected, inputs.dtype, f"float64, {T} queries from position {start} on"))
    return checks


def _dense_step_parity(inputs: Inputs, backend: str) -> list[Parity]:
    return _dense_parity(inputs, backend, T=1)


CASES: tuple[Case, ...] = (
    Case(
        "lightning",
        "prefill",
        cost.lightning_prefill,
        _lightning_prefill,
        _lightning_parity,
        correlated=False,
        rivals=(FLA,),
    ),
    Case(
        "lightning",
        "training",
        cost.lightning_training,
        _lightning_training,
        _lightning_training_parity,
        correlated=False,
        trains=True,
        rivals=(FLA,),
    ),
    Case(
        "lightning", "step", cost.lightning_step, _lightning_step, _lightning_step_parity, cold=True, correlated=False
    ),
    Case("infllm", "prefill", cost.infllm_prefill, _infllm_prefill, _infllm_parity),
    Case("infllm", "training", cost.infllm_training, _infllm_training, _infllm_training_parity, trains=True),
    Case("infllm", "selection", cost.infllm_selection, _infllm_selection, _infllm_parity),
    Case("infllm", "step", cost.infllm_step, _infllm_step, _infllm_step_parity, cold=True),
    Case("dense", "prefill", cost.dense_prefill, _dense_prefill, _dense_parity, correlated=False),
    Case("dense", "step", cost.dense_step, _dense_step, _dense_step_parity, cold=True, correlated=False),
)
