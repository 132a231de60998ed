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
from sala.ops.lightning.triton.kernels import carry_kernel, outputs_kernel, states_kernel, steps_kernel

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
