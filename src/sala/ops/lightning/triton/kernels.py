"""The kernels of a scan: states of segments, what carries them over, outputs chunk by chunk, and few tokens one by one."""

from typing import Any

import triton
import triton.language as tl

from sala.ops import gpu

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
