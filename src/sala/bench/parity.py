"""Operators against their definition, on short inputs of the shape that is timed: what computes something else is not timed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from sala.bench.fla import lightning_by
from sala.bench.inputs import Inputs
from sala.ops.dense import dense_attention
from sala.ops.infllm import infllm_attention, select_blocks
from sala.ops.lightning import lightning_attention

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

# a gradient is made from the output and the weights, which are rounded already: twice the roundings of what is made once
GRADIENT_ROUNDINGS = 2
# of a gradient: four chunks and a piece, each of whose states the definition keeps
PARITY_TRAINING_TOKENS = 258


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a backend is from the definition: the largest difference over the largest number, or a share of blocks."""

    error: float
    tolerance: float
    against: str

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # also False for NaN


def _difference(actual: Tensor, expected: Tensor, dtype: torch.dtype, against: str, roundings: int = 1) -> Parity:
    largest = max(expected.abs().max().item(), 1e-30)
    error = (actual.double() - expected).abs().max().item() / largest
    return Parity(error, roundings * TOLERANCES[dtype], against)


def lightning(inputs: Inputs, backend: str, lengths: Sequence[int] = ()) -> list[Parity]:
    """A whole number of chunks and a piece, or pieces of `lengths`, from a state that is not zero; output and state."""
    lengths = lengths or (PARITY_LIGHTNING_TOKENS,)
    T, checks = sum(lengths), []
    q, k, v = inputs.lightning(T)
    state, wanted_state = inputs.state(), inputs.state().double()
    decay_H, scale = inputs.log_decay(), q.shape[3] ** -0.5
    for part in torch.arange(T).split(list(lengths)):
        now = slice(int(part[0]), int(part[-1]) + 1)
        q_n, k_n, v_n = q[:, now], k[:, now], v[:, now]
        out, state = lightning_by(backend)(q_n, k_n, v_n, decay_H, scale=scale, initial_state_BHKV=state)
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


def lightning_training(inputs: Inputs, backend: str) -> list[Parity]:
    """Gradients of a random part of the output."""
    q, k, v = inputs.lightning(PARITY_TRAINING_TOKENS)
    decay_H, scale = inputs.log_decay(), q.shape[3] ** -0.5
    grad = torch.randn_like(q)

    def gradients(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, _ = lightning_by(name)(*leaves, decay_H, scale=scale)
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))

    return [
        _difference(
            found, wanted, inputs.dtype, f"reference, {q.shape[1]} tokens, gradient of {name}", GRADIENT_ROUNDINGS
        )
        for name, found, wanted in zip(
            "qkv", gradients(backend, q, k, v), gradients("reference", *(x.double() for x in (q, k, v))), strict=True
        )
    ]


def lightning_step(inputs: Inputs, backend: str) -> list[Parity]:
    return lightning(inputs, backend, [1] * PARITY_STEPS)


def infllm(inputs: Inputs, backend: str, T: int = PARITY_CHUNK) -> list[Parity]:
    """Two chunks, some of their queries against the definition: one over the border of dense and sparse, one far behind.

    The table of blocks is compared first. A query with another table than the definition's, within the tolerance of
    nearly equal scores, has another output too: it is compared with attention over its own table.
    """
    first_sparse = inputs.shape.geometry.first_sparse_position(2**40)
    starts = (max(0, first_sparse - T // 2), 2 * first_sparse + 5)
    return [found for start in starts for found in _infllm_chunk(inputs, backend, T, start, first_sparse)]


def _infllm_chunk(inputs: Inputs, backend: str, T: int, start: int, first_sparse: int) -> list[Parity]:
    geometry, scale = inputs.shape.geometry, inputs.scale
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
    scale = inputs.scale
    table = select_blocks(q, k1, k2, positions_BT, inputs.shape.geometry, scale=scale, backend="reference")
    return table.to(inputs.device)


def infllm_training(inputs: Inputs, backend: str) -> list[Parity]:
    """Gradients of some queries' output, over the border of dense and sparse and behind it, over the backend's own table."""
    geometry, scale = inputs.shape.geometry, inputs.scale
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
        _difference(one, two, inputs.dtype, f"{against} {name}", GRADIENT_ROUNDINGS)
        for name, one, two in zip("qkv", found, wanted, strict=True)
    ]


def infllm_step(inputs: Inputs, backend: str) -> list[Parity]:
    return infllm(inputs, backend, T=1)


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


def dense(inputs: Inputs, backend: str, T: int = PARITY_CHUNK) -> list[Parity]:
    """From the start of a sequence, and as a later chunk of one; against the same in float64."""
    checks = []
    for start in (0, PARITY_CHUNK + 1):
        q, k, v = inputs.attention(T, start + T)
        out = dense_attention(q, k, v, None, scale=inputs.scale, start=start, backend=backend)
        expected = dense_attention(q.double(), k.double(), v.double(), None, scale=inputs.scale, start=start)
        checks.append(_difference(out, expected, inputs.dtype, f"float64, {T} queries from position {start} on"))
    return checks


def dense_step(inputs: Inputs, backend: str) -> list[Parity]:
    return dense(inputs, backend, T=1)
