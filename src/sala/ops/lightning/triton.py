"""Lightning attention in Triton, for GPUs: a scan over chunks, parallel over heads and segments of the sequence.

One torch operator, `scan`, whose gradients are scans again with the tensors' roles exchanged: nothing but its inputs is
kept for the backward pass, and it may be differentiated as often as one likes.

    states   what each segment's tokens add to the state at its end       (all segments at once)
    carry    from those, the state before each segment                    (segment after segment, a few)
    outputs  from the state before its segment, chunk after chunk         (all segments at once)

A sequence that fills the device with its heads and batch rows alone is one segment, and needs the last kernel only.
States never reach memory a chunk at a time: a segment holds its own in registers. Those before the segments are made once
for the scans that exchange keys and values, whose states are each other's transposes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sala.ops import gpu

# programs that fill a large device a few times over; a constant, so that results are the same bits on every device
PROGRAMS = 512
# a state is read and written about four times a segment; from here on that is little beside the segment's tokens
MIN_SEGMENT = 1024
# up to so many tokens a row the recurrence itself, which reads and writes the state once, is all there is to gain
FEW_TOKENS = 8
# one length for every tuning: sums are made in the same order
CHUNK = 64
CARRY_BLOCK = 1024
STEP_ELEMENTS = 4096

# the smallest positive float32 is exp(-103.3): beyond this exponent a factor is zero
REACH = tl.constexpr(104.0)

NARROW = triton.Config({"BV": 32}, num_warps=4, num_stages=2)
# of float32 wider than 128, whose tiles are large: nothing is loaded ahead
SLIM = triton.Config({"BV": 32}, num_warps=4, num_stages=1)
# values a program, what else is compiled for; wider tiles of values do not fit into the registers
TUNINGS = [
    triton.Config({"BV": 64}, num_warps=4, num_stages=2),
    triton.Config({"BV": 64}, num_warps=4, num_stages=3),
    triton.Config({"BV": 32}, num_warps=8, num_stages=2),
    NARROW,
    SLIM,
]


def _fitting(tunings: list[triton.Config], arguments: dict[str, Any], **options: Any) -> list[triton.Config]:
    """Return the tunings worth a try; there is one for narrow values, and for products of float32."""
    if options["WIDE"] == tl.float32:
        return [SLIM if options["BK"] > 128 else NARROW]
    return [NARROW] if arguments["V"] <= 32 else tunings[:-1]


@triton.jit
def _bounds(row, cell, cu_seqlens, T, segment_tokens, PACKED: tl.constexpr):
    """Return the tokens of a row within a cell of the grid of segments: the first, and the one after the last."""
    start = cell * segment_tokens
    stop = tl.minimum(start + segment_tokens, T)
    if PACKED:
        start = tl.maximum(start, tl.load(cu_seqlens + row).to(tl.int32))
        stop = tl.maximum(start, tl.minimum(stop, tl.load(cu_seqlens + row + 1).to(tl.int32)))
    return start, stop


@triton.jit
def _cells(row, cu_seqlens, num_segments, segment_tokens, PACKED: tl.constexpr):
    """Return the first and the last cell of a row's segments; a packed row shares its cells with its neighbours."""
    if PACKED:
        first = tl.load(cu_seqlens + row).to(tl.int32) // segment_tokens
        last = tl.load(cu_seqlens + row + 1).to(tl.int32) // segment_tokens
    else:
        first = 0
        last = num_segments - 1
    return first, last


@triton.jit
def _segment(index, segment_rows, num_segments, PACKED: tl.constexpr):
    """Return the row and the cell of a segment. In packed rows a segment's index is its row plus its cell."""
    if PACKED:
        row = tl.load(segment_rows + index)
        cell = index - row
    else:
        row = index // num_segments
        cell = index % num_segments
    return row, cell


@triton.jit
def _ages(seen_before, origin, stop, time_C, MASKED: tl.constexpr):
    """Return which times are tokens, and how many tokens lie from `origin` to each, itself included, and after it to `stop`."""
    inside_C = time_C < stop
    if MASKED:
        first = tl.load(seen_before + origin)
        last = tl.load(seen_before + stop)
        earlier_C = tl.load(seen_before + time_C, mask=inside_C, other=0)
        seen_C = tl.load(seen_before + time_C + 1, mask=inside_C, other=0)
        is_token_C = seen_C > earlier_C
        since_C = seen_C - first
        until_C = last - seen_C
        count = last - first
    else:
        is_token_C = inside_C
        since_C = time_C + 1 - origin
        until_C = stop - 1 - time_C
        count = stop - origin
    # beyond the end, where everything read is zero, the factor must still be finite
    return is_token_C, tl.maximum(since_C, 0).to(tl.float32), tl.maximum(until_C, 0).to(tl.float32), count


@triton.jit
def _weights(position_C, token_C, log_decay, REVERSE: tl.constexpr):
    """Return the decay between the tokens of a chunk, (C, C): of queries in rows, of keys in columns."""
    weights_CC = tl.exp(log_decay * tl.abs(position_C[:, None] - position_C[None, :]))
    if REVERSE:
        return tl.where(token_C[:, None] <= token_C[None, :], weights_CC, 0.0)
    else:
        return tl.where(token_C[:, None] >= token_C[None, :], weights_CC, 0.0)


@triton.jit
def _token(x, batch, head, time):
    """Return where a token's numbers begin."""
    # a tensor may hold more than 2^31 numbers
    return x.at + batch * x.row + head * x.head + tl.cast(time, tl.int64) * x.place


@triton.jit
def _load(x, batch, head, time, is_token_C, column_K, width: tl.constexpr):
    """Return the numbers of a chunk of tokens from `time` on, (C, K), zero where there is no token."""
    token_C = tl.arange(0, is_token_C.shape[0])
    at_CK = _token(x, batch, head, time) + token_C[:, None] * x.place + column_K[None, :]
    return tl.load(at_CK, mask=is_token_C[:, None] & (column_K < width)[None, :], other=0.0)


# fmt: off
# arguments in tables, a line a kind


@triton.jit(do_not_specialize=["T", "segment_tokens", "num_segments"])
def states_kernel(
    k, v, states, log_decay, seen_before, cu_seqlens, segment_rows, scale,
    T, segment_tokens, num_segments, H, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
):
    """Write what a segment's tokens add to the state at its end (reversed: at its start), for one tile of the state."""
    program = tl.program_id(0)
    v_tiles = tl.cdiv(V, BV)
    tiles = tl.cdiv(K, BK) * v_tiles
    tile = program % tiles
    head = ((program // tiles) % H).to(tl.int64)
    index = program // (tiles * H)
    row, cell = _segment(index, segment_rows, num_segments, PACKED)
    first_cell, last_cell = _cells(row, cu_seqlens, num_segments, segment_tokens, PACKED)
    # what the last one adds is in nobody's past
    if cell == (first_cell if REVERSE else last_cell):
        return
    start, stop = _bounds(row, cell, cu_seqlens, T, segment_tokens, PACKED)
    slope = tl.load(log_decay + head)

    token_C = tl.arange(0, C)
    k_K = (tile // v_tiles) * BK + tl.arange(0, BK)
    v_V = (tile % v_tiles) * BV + tl.arange(0, BV)
    batch = row.to(tl.int64) * (0 if PACKED else 1)
    if MASKED:
        seen_before += batch * (T + 1)

    first_chunk = 0
    last_chunk = tl.cdiv(stop - start, C)
    if not MASKED:
        # a head that forgets within the segment: all else would be multiplied by zero
        # a constant divided by `/` stays a constant for the interpreter of Triton 3.7
        reach = tl.minimum(tl.fdiv(REACH, tl.maximum(-slope, 1e-9)), 1e9).to(tl.int32) + 1
        if REVERSE:
            last_chunk = tl.cdiv(tl.minimum(stop - start, reach), C)
        else:
            first_chunk = tl.maximum(stop - start - reach, 0) // C
    state_KV = tl.zeros([BK, BV], dtype=tl.float32)
    for chunk in range(first_chunk, last_chunk):
        at = start + chunk * C
        is_token_C, since_C, until_C, _ = _ages(seen_before, start, stop, at + token_C, MASKED)
        write_C = tl.exp(slope * since_C) * scale if REVERSE else tl.exp(slope * until_C)
        k_CK = _load(k, batch, head, at, is_token_C, k_K, K).to(WIDE)
        v_CV = _load(v, batch, head, at, is_token_C, v_V, V)
        state_KV = tl.dot(tl.trans(k_CK), (v_CV * write_C[:, None]).to(WIDE), state_KV, input_precision=PRECISION)
    states += (index.to(tl.int64) * H + head) * K * V
    tl.store(states + k_K[:, None] * V + v_V[None, :], state_KV, mask=(k_K < K)[:, None] & (v_V < V)[None, :])


@triton.jit(do_not_specialize=["T", "segment_tokens", "num_segments"])
def carry_kernel(
    states, initial, log_decay, seen_before, cu_seqlens,
    T, segment_tokens, num_segments, H, K: tl.constexpr, V: tl.constexpr,
    initial_row, initial_head, initial_key, initial_value,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
):
    """Replace what each segment adds by the state before it (reversed: after it), for a block of the state's numbers."""
    program = tl.program_id(0)
    blocks = tl.cdiv(K * V, BLOCK)
    head = ((program // blocks) % H).to(tl.int64)
    row = program // (blocks * H)
    first_cell, last_cell = _cells(row, cu_seqlens, num_segments, segment_tokens, PACKED)
    slope = tl.load(log_decay + head)
    number_X = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside_X = number_X < K * V
    batch = row.to(tl.int64) * (0 if PACKED else 1)
    if MASKED:
        seen_before += batch * (T + 1)
    state_X = tl.zeros([BLOCK], dtype=tl.float32)
    if initial is not None:
        initial += row.to(tl.int64) * initial_row + head * initial_head
        state_X = tl.load(
            initial + (number_X // V) * initial_key + (number_X % V) * initial_value, mask=inside_X, other=0.0
        )
    # a row's segments are neighbours in memory
    index = row + first_cell if PACKED else row * num_segments
    for step in range(last_cell - first_cell):
        cell = last_cell - step if REVERSE else first_cell + step
        start, stop = _bounds(row, cell, cu_seqlens, T, segment_tokens, PACKED)
        at_X = states + ((index + cell - first_cell).to(tl.int64) * H + head) * K * V + number_X
        added_X = tl.load(at_X, mask=inside_X, other=0.0)
        tl.store(at_X, state_X, mask=inside_X)
        count = tl.load(seen_before + stop) - tl.load(seen_before + start) if MASKED else stop - start
        state_X = state_X * tl.exp(slope * count.to(tl.float32)) + added_X
    last = index if REVERSE else index + last_cell - first_cell
    tl.store(states + (last.to(tl.int64) * H + head) * K * V + number_X, state_X, mask=inside_X)


# anew for each number of a row's segments, of which there are few: what fits best while programs are few is not best for a full card
@triton.autotune(
    TUNINGS[-1:] if gpu.interpreted() else TUNINGS, key=["K", "V", "num_segments"],
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit(do_not_specialize=["T", "segment_tokens", "num_segments"])
def outputs_kernel(
    q, k, v, out, states, initial, final, log_decay, seen_before, cu_seqlens, segment_rows, scale,
    T, segment_tokens, num_segments, H, K: tl.constexpr, V: tl.constexpr, states_key, states_value,
    initial_row, initial_head, initial_key, initial_value,
    C: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
    BV: tl.constexpr,
):
    """Write a segment's outputs, for one tile of the values, and the row's last state where the segment is its last."""
    program = tl.program_id(0)
    v_tiles = tl.cdiv(V, BV)
    head = ((program // v_tiles) % H).to(tl.int64)
    index = program // (v_tiles * H)
    if states is None:
        row, cell = index, 0
        first_cell, last_cell = 0, 0
    else:
        row, cell = _segment(index, segment_rows, num_segments, PACKED)
        first_cell, last_cell = _cells(row, cu_seqlens, num_segments, segment_tokens, PACKED)
    start, stop = _bounds(row, cell, cu_seqlens, T, segment_tokens, PACKED)
    slope = tl.load(log_decay + head)

    token_C = tl.arange(0, C)
    k_K = tl.arange(0, BK)
    v_V = (program % v_tiles) * BV + tl.arange(0, BV)
    in_state_KV = (k_K < K)[:, None] & (v_V < V)[None, :]
    state_KV = tl.zeros([BK, BV], dtype=tl.float32)
    if states is not None:
        states += (index.to(tl.int64) * H + head) * K * V
        at_KV = states + k_K[:, None] * states_key + v_V[None, :] * states_value
        state_KV = tl.load(at_KV, mask=in_state_KV, other=0.0)
    elif initial is not None:
        initial += row.to(tl.int64) * initial_row + head * initial_head
        state_KV = tl.load(
            initial + k_K[:, None] * initial_key + v_V[None, :] * initial_value, mask=in_state_KV, other=0.0
        )
    batch = row.to(tl.int64) * (0 if PACKED else 1)
    out += (batch * T * H + head) * V
    if MASKED:
        seen_before += batch * (T + 1)
    # without a mask the same in every chunk
    weights_CC = _weights(token_C, token_C, slope, REVERSE) * scale

    num_chunks = tl.cdiv(stop - start, C)
    for step in range(num_chunks):
        at = start + (num_chunks - 1 - step if REVERSE else step) * C
        time_C = at + token_C
        is_token_C, since_C, until_C, count = _ages(seen_before, at, tl.minimum(at + C, stop), time_C, MASKED)
        if MASKED:
            weights_CC = _weights(since_C, token_C, slope, REVERSE) * scale
        if REVERSE:
            read_C = tl.exp(slope * until_C)
            write_C = tl.exp(slope * since_C) * scale
        else:
            read_C = tl.exp(slope * since_C) * scale
            write_C = tl.exp(slope * until_C)
        far = at.to(tl.int64)
        q_CK = _load(q, batch, head, at, is_token_C, k_K, K).to(WIDE)
        k_CK = _load(k, batch, head, at, is_token_C, k_K, K).to(WIDE)
        v_CV = _load(v, batch, head, at, is_token_C, v_V, V)
        scores_CC = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION) * weights_CC
        # the state keeps its float32; only the copy that is multiplied is rounded
        out_CV = tl.dot(q_CK, state_KV.to(WIDE), input_precision=PRECISION) * read_C[:, None]
        out_CV = tl.dot(scores_CC.to(WIDE), v_CV.to(WIDE), out_CV, input_precision=PRECISION)
        tl.store(
            out + far * H * V + token_C[:, None] * H * V + v_V[None, :], out_CV.to(out.dtype.element_ty),
            mask=(time_C < stop)[:, None] & (v_V < V)[None, :],
        )
        state_KV = tl.dot(
            tl.trans(k_CK), (v_CV * write_C[:, None]).to(WIDE), state_KV * tl.exp(slope * count.to(tl.float32)),
            input_precision=PRECISION,
        )
    if cell == (first_cell if REVERSE else last_cell):
        final += (row.to(tl.int64) * H + head) * K * V
        tl.store(final + k_K[:, None] * V + v_V[None, :], state_KV, mask=in_state_KV)


@triton.jit(do_not_specialize=["T"])
def steps_kernel(
    q, k, v, out, initial, final, log_decay, mask, cu_seqlens, scale,
    T, H, K: tl.constexpr, V: tl.constexpr,
    initial_row, initial_head, initial_key, initial_value, mask_row, mask_token,
    BK: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
):
    """The recurrence, token by token, for one tile of a state: to decode."""
    program = tl.program_id(0)
    v_tiles = tl.cdiv(V, BV)
    head = ((program // v_tiles) % H).to(tl.int64)
    row = (program // (v_tiles * H)).to(tl.int64)
    slope = tl.load(log_decay + head)
    k_K = tl.arange(0, BK)
    v_V = (program % v_tiles) * BV + tl.arange(0, BV)
    in_state_KV = (k_K < K)[:, None] & (v_V < V)[None, :]
    state_KV = tl.zeros([BK, BV], dtype=tl.float32)
    if initial is not None:
        initial += row * initial_row + head * initial_head
        state_KV = tl.load(
            initial + k_K[:, None] * initial_key + v_V[None, :] * initial_value, mask=in_state_KV, other=0.0
        )
    batch = row * (0 if PACKED else 1)
    start, stop = 0, T
    if PACKED:
        start, stop = tl.load(cu_seqlens + row).to(tl.int32), tl.load(cu_seqlens + row + 1).to(tl.int32)
    for time in range(start, stop):
        tokens = 1
        if mask is not None:
            tokens = tl.load(mask + batch * mask_row + time * mask_token).to(tl.int32)
        q_K = tl.load(_token(q, batch, head, time) + k_K, mask=k_K < K * tokens, other=0.0)
        key_K = tl.load(_token(k, batch, head, time) + k_K, mask=k_K < K * tokens, other=0.0)
        value_V = tl.load(_token(v, batch, head, time) + v_V, mask=v_V < V * tokens, other=0.0)
        added_KV = key_K.to(tl.float32)[:, None] * value_V.to(tl.float32)[None, :]
        state_KV = state_KV * tl.exp(slope * tokens) + added_KV
        out_V = tl.sum(q_K.to(tl.float32)[:, None] * state_KV, axis=0) * scale
        tl.store(out + ((batch * T + time) * H + head) * V + v_V, out_V.to(out.dtype.element_ty), mask=v_V < V)
    final += (row * H + head) * K * V
    tl.store(final + k_K[:, None] * V + v_V[None, :], state_KV, mask=in_state_KV)


# fmt: on


def attend(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_H: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None,
    mask_BT: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `sala.ops.lightning.lightning_attention`.

    States and sums are float32 throughout. bfloat16 inputs are multiplied in bfloat16, where the copy of the state that
    is read is rounded too; float16 in tf32, which has its precision and the range that sums need; float32 in three
    products of tf32.
    """
    return _scan(q_BTHK, k_BTHK, v_BTHV, log_decay_H, float(scale), initial_state_BHKV, mask_BT, cu_seqlens, False)


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    states = _states_between(k, v, log_decay, scale, initial, mask, cu_seqlens, reverse)
    return scan(q, k, v, log_decay, scale, initial, mask, cu_seqlens, reverse, states)


def _num_rows(k: Tensor, cu_seqlens: Tensor | None) -> int:
    return k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _is_steps(k: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> bool:
    return k.shape[1] <= FEW_TOKENS * _num_rows(k, cu_seqlens) and not reverse


def _segment_tokens(k: Tensor) -> int:
    """Return the tokens of a segment, whole chunks."""
    B, T, H, _ = k.shape
    segments = min(triton.cdiv(PROGRAMS, max(1, B * H)), triton.cdiv(T, MIN_SEGMENT))
    return triton.cdiv(triton.cdiv(T, segments), CHUNK) * CHUNK


def _num_segments(k: Tensor, cu_seqlens: Tensor | None) -> int:
    """Return how many segments all rows have; of packed rows, the most they can have."""
    B, T = k.shape[:2]
    segment_tokens = _segment_tokens(k)
    return B * triton.cdiv(T, segment_tokens) if cu_seqlens is None else T // segment_tokens + _num_rows(k, cu_seqlens)


@torch.no_grad()
def _states_between(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor | None:
    """Return the states before all segments of a scan, None where each row is one. The scan of (v, k) has their transposes."""
    if _is_steps(k, cu_seqlens, reverse) or _segment_tokens(k) >= k.shape[1]:
        return None
    return states_between(k, v, log_decay, scale, initial, mask, cu_seqlens, reverse)


def _empty(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    H, K = q.shape[2:]
    return v.new_empty(v.shape), q.new_empty(_num_rows(q, cu_seqlens), H, K, v.shape[-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, log_decay, ctx.scale, initial, mask, cu_seqlens, ctx.reverse, states = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial, mask, cu_seqlens, states)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of a scan.

    With s = scale, r = exp(log_decay) and S a state, a scan and a reversed scan are

        o_i = s sum_{j<=i} r^(i-j) (q_i k_j) v_j + s r^(i+1) S^T q_i    S' = r^T S +   sum_j r^(T-1-j) k_j v_j^T
        o_i = s sum_{j>=i} r^(j-i) (q_i k_j) v_j + r^(T-1-i) S^T q_i    S' = r^T S + s sum_j r^(j+1) k_j v_j^T

    and the derivatives of either are sums of these forms: those of q in its own direction, the others in the opposite.
    """
    q, k, v, log_decay, initial, mask, cu_seqlens, states = ctx.saved_tensors
    wants_q, wants_k, wants_v, _, _, wants_initial, *_ = ctx.needs_input_grad
    if d_out is None:
        d_out = torch.zeros_like(v)
    d_q = d_k = d_v = d_initial = None

    shared, back = (log_decay, ctx.scale), not ctx.reverse
    if wants_q:
        before = None if states is None else states.mT
        start = None if initial is None else initial.mT
        d_q, _ = scan(d_out, v, k, *shared, start, mask, cu_seqlens, ctx.reverse, before)
    if wants_k or wants_v or wants_initial:
        after = _states_between(q, d_out, *shared, d_final, mask, cu_seqlens, back)
    if wants_k:
        after_k = None if after is None else after.mT
        end = None if d_final is None else d_final.mT
        d_k, _ = scan(v, d_out, q, *shared, end, mask, cu_seqlens, back, after_k)
    if wants_v or wants_initial:
        d_v, d_initial = scan(k, q, d_out, *shared, d_final, mask, cu_seqlens, back, after)
    return d_q, d_k, d_v, None, None, d_initial if wants_initial else None, None, None, None, None


@gpu.operator(
    "lightning_scan(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? initial, Tensor? mask, "
    "Tensor? cu_seqlens, bool reverse, Tensor? states=None) -> (Tensor, Tensor)",
    fake=_empty,
    setup_context=_keep,
    backward=_gradients,
)
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each token's output, (B, T, H, V), and the last state: see `_gradients` for both directions.

    states: what `_states_between` returns for the same call: not an input, but work done already.
    """
    out, final = _empty(q, k, v, log_decay, scale, initial, mask, cu_seqlens, reverse)
    if final.numel() == 0:
        return out.zero_(), final
    log_decay = log_decay.to(torch.float32).contiguous()
    if _is_steps(k, cu_seqlens, reverse):
        _steps(q, k, v, out, initial, final, log_decay, mask, cu_seqlens, scale)
    else:
        _chunks(q, k, v, out, states, initial, final, log_decay, mask, cu_seqlens, scale, reverse)
    return out, final


def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    initial: Tensor | None,
    final: Tensor,
    log_decay: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> None:
    rows, H, K, V = final.shape
    width, value_width = _padded(K), _padded(V)
    # as many values a program as keep its part of the state in registers
    tile = min(value_width, STEP_ELEMENTS // width)
    mask_strides: tuple[int, ...] = (0, 0)
    if mask is not None:
        mask, mask_strides = mask.view(torch.uint8), mask.stride()
    steps_kernel[(rows * H * triton.cdiv(V, tile),)](
        *(*map(gpu.strided, (q, k, v)), out, initial, final, log_decay, mask, cu_seqlens, scale),
        *(q.shape[1], H, K, V, *_strides(initial), *mask_strides),
        BK=width,
        BV=tile,
        PACKED=cu_seqlens is not None,
        num_warps=4,
    )


def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    states: Tensor | None,
    initial: Tensor | None,
    final: Tensor,
    log_decay: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
) -> None:
    T = q.shape[1]
    rows, H, K, V = final.shape
    segment_tokens, row_segments, segments, segment_rows = T, 1, rows, None
    state_strides: tuple[int, ...] = (0, 0)
    if states is not None:
        segment_tokens, row_segments, segments, segment_rows = _segments(k, cu_seqlens)
        state_strides = states.stride()[2:]
    outputs_kernel[lambda tile: (segments * H * triton.cdiv(V, tile["BV"]),)](
        *(*map(gpu.strided, (q, k, v)), out, states, initial, final, log_decay, _seen_before(mask), cu_seqlens),
        *(segment_rows, scale, T, segment_tokens, row_segments, H, K, V, *state_strides, *_strides(initial)),
        BK=_padded(K),
        **_products(q.dtype, _padded(K)),
        **_flags(mask, cu_seqlens, reverse),
    )


def _empty_states(k: Tensor, v: Tensor, *others: object) -> Tensor:
    cu_seqlens = others[4]
    assert cu_seqlens is None or isinstance(cu_seqlens, Tensor)
    return k.new_empty(_num_segments(k, cu_seqlens), *k.shape[2:], v.shape[-1], dtype=torch.float32)


@gpu.operator(
    "lightning_states(Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? initial, Tensor? mask, "
    "Tensor? cu_seqlens, bool reverse) -> Tensor",
    fake=_empty_states,
)
def states_between(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Tensor:
    """Return the state before each segment (reversed: after it), (segments, H, K, V) float32."""
    states = _empty_states(k, v, log_decay, scale, initial, mask, cu_seqlens, reverse)
    segments, H, K, V = states.shape
    if not states.numel():
        return states
    segment_tokens, row_segments, segments, segment_rows = _segments(k, cu_seqlens)
    log_decay, seen_before = log_decay.to(torch.float32).contiguous(), _seen_before(mask)
    sizes = (k.shape[1], segment_tokens, row_segments, H, K, V)
    k_tile, v_tile = min(_padded(K), 128), min(_padded(V), 128)
    flags, products = _flags(mask, cu_seqlens, reverse), _products(k.dtype, _padded(K))
    states_kernel[(segments * H * triton.cdiv(K, k_tile) * triton.cdiv(V, v_tile),)](
        *(*map(gpu.strided, (k, v)), states, log_decay, seen_before, cu_seqlens, segment_rows, scale, *sizes),
        BK=k_tile,
        BV=v_tile,
        **products,
        **flags,
        num_warps=8 if k_tile * v_tile == 128 * 128 else 4,
        num_stages={torch.bfloat16: 3, torch.float16: 2, torch.float32: 1}[k.dtype],
    )
    carry_kernel[(_num_rows(k, cu_seqlens) * H * triton.cdiv(K * V, CARRY_BLOCK),)](
        *(states, initial, log_decay, seen_before, cu_seqlens, *sizes, *_strides(initial)),
        BLOCK=CARRY_BLOCK,
        **flags,
    )
    return states


def _segments(k: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, Tensor | None]:
    """Return the tokens of a segment, the segments of a row and of all, and of packed rows the row of each."""
    segment_tokens = _segment_tokens(k)
    rows = None if cu_seqlens is None else _segment_rows(cu_seqlens, k.shape[1], segment_tokens)
    return segment_tokens, triton.cdiv(k.shape[1], segment_tokens), _num_segments(k, cu_seqlens), rows


def _seen_before(mask: Tensor | None) -> Tensor | None:
    """Return how many tokens lie before each column and at the end, (B, T + 1)."""
    return None if mask is None else torch.nn.functional.pad(mask.cumsum(1, dtype=torch.int32), (1, 0))


def _flags(mask: Tensor | None, cu_seqlens: Tensor | None, reverse: bool) -> dict[str, bool]:
    return {"REVERSE": reverse, "MASKED": mask is not None, "PACKED": cu_seqlens is not None}


def _segment_rows(cu_seqlens: Tensor, T: int, segment_tokens: int) -> Tensor:
    """Return the row of each segment of packed rows: its number is its row's plus its cell's, so that all are different.

    The number of segments is not known without a look at `cu_seqlens`; there are at most as many as this returns, and
    those too many are empty ends of rows.
    """
    num_rows = cu_seqlens.shape[0] - 1
    row_N = torch.arange(num_rows, device=cu_seqlens.device)
    first_N = cu_seqlens[:-1] // segment_tokens + row_N
    index_S = torch.arange(T // segment_tokens + num_rows, device=cu_seqlens.device)
    return (torch.searchsorted(first_N, index_S, right=True) - 1).to(torch.int32)


def _products(dtype: torch.dtype, width: int) -> dict[str, Any]:
    """Return the tokens of a chunk, what products are made of, and how those of float32 are made."""
    if dtype == torch.bfloat16:
        return {"C": CHUNK, "WIDE": tl.bfloat16, "PRECISION": "tf32"}
    # sums pass the range of float16; tf32 has its precision
    exact = "tf32x3" if torch.version.hip is None else "ieee"
    precision = "tf32" if dtype == torch.float16 else exact
    return {"C": CHUNK if width <= 128 else CHUNK // 2, "WIDE": tl.float32, "PRECISION": precision}


def _padded(width: int) -> int:
    # the tensor cores multiply sixteen at a time
    return max(16, triton.next_power_of_2(width))


def _strides(initial: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if initial is None else initial.stride()
