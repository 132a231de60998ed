"""The elementwise work in Triton, for GPUs: each function one launch that reads its inputs once and writes its results once.

A program holds a row, or some heads of one token, in registers in float32; it rounds where plain torch rounds. There are
no gradients: where they are wanted plain torch runs, which a compiler fuses forward and backward.
"""

import triton
import triton.language as tl
from torch import Tensor

from sala.ops import gpu
from sala.ops.pointwise.layout import close, contiguous, count, rows

# numbers a thread holds of each tensor, two loads of 16 bytes where they are bfloat16
THREAD_ELEMENTS = 16
# of the functions that need no whole row, numbers a program
BLOCK = 1024
# of a token's heads when they are turned, numbers a program: those of a token read the same cosines
TURN_ELEMENTS = 2048


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """Round to the tensors' dtype, and go on in float32."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def _sum(x, branch, scale, dtype: tl.constexpr):
    return _rounded(x + _rounded(branch * scale, dtype), dtype)


# fmt: off


@triton.jit(do_not_specialize=["num_rows"])
def _norm(
    x, branch, weight, total, out, scale, eps, num_rows, x_row, branch_row,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Norm rows; with a branch, those of x + scale * branch, which are written too."""
    row_N1 = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column_D = tl.arange(0, COLUMNS)
    inside_ND = (row_N1 < num_rows) & (column_D < WIDTH)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    x_ND = tl.load(x + row_N1 * x_row + column_D[None, :], mask=inside_ND, other=0.0).to(tl.float32)
    if branch is not None:
        branch_ND = tl.load(branch + row_N1 * branch_row + column_D[None, :], mask=inside_ND, other=0.0).to(tl.float32)
        x_ND = _sum(x_ND, branch_ND, scale, dtype)
        tl.store(total + row_N1 * WIDTH + column_D[None, :], x_ND.to(dtype), mask=inside_ND)
    inverse_N = tl.rsqrt(tl.sum(x_ND * x_ND, 1) / WIDTH + eps)
    weight_D = tl.load(weight + column_D, mask=column_D < WIDTH, other=0.0).to(tl.float32)
    out_ND = _rounded(x_ND * inverse_N[:, None], dtype) * weight_D[None, :]
    tl.store(out + row_N1 * WIDTH + column_D[None, :], out_ND.to(dtype), mask=inside_ND)


@triton.jit
def _combine(
    x, other, out, scale, x_row, other_row, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr
):
    """Write silu(x) * other, or x + scale * other, for a part of one row."""
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column_D = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside_D = column_D < WIDTH
    dtype: tl.constexpr = out.dtype.element_ty
    x_D = tl.load(x + row * x_row + column_D, mask=inside_D, other=0.0).to(tl.float32)
    other_D = tl.load(other + row * other_row + column_D, mask=inside_D, other=0.0).to(tl.float32)
    if SILU:
        out_D = _rounded(x_D / (1 + tl.exp(-x_D)), dtype) * other_D
    else:
        out_D = _sum(x_D, other_D, scale, dtype)
    tl.store(out + row * WIDTH + column_D, out_D.to(dtype), mask=inside_D)


@triton.jit
def _normed(x_HK, square_H, weight, column_K, is_column_K, dtype: tl.constexpr):
    weight_K = tl.load(weight + column_K, mask=is_column_K, other=0.0).to(tl.float32)
    return _rounded(_rounded(x_HK * tl.rsqrt(square_H)[:, None], dtype) * weight_K[None, :], dtype)


@triton.jit
def _scaled(x_HK, scale, dtype: tl.constexpr):
    return x_HK if scale is None else x_HK * _rounded(tl.load(scale), dtype)


@triton.jit(do_not_specialize=["T"])
def _turn(
    x, weight, cosine, sine, scale, out, eps, T, H, x_batch, x_token, x_head, table_batch, scale_batch,
    K: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, STILL: tl.constexpr, PAIRS: tl.constexpr,
):
    """Norm some heads of one token, turn the pairs (i, i + R) of their last 2 R numbers, and scale them."""
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    head_H = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    is_head_H = head_H < H
    dtype: tl.constexpr = out.dtype.element_ty
    x_H = x + b * x_batch + t * x_token + head_H * x_head
    out_H = out + (token * H + head_H) * K
    if scale is not None:
        scale += b * scale_batch + t
    squares_H = tl.zeros([HEADS], tl.float32)
    if K > 2 * R:
        column_S = tl.arange(0, STILL)
        is_still_S = column_S < K - 2 * R
        in_still_HS = is_head_H[:, None] & is_still_S[None, :]
        still_HS = tl.load(x_H[:, None] + column_S[None, :], mask=in_still_HS, other=0.0).to(tl.float32)
        squares_H += tl.sum(still_HS * still_HS, 1)
    if R > 0:
        pair_R = tl.arange(0, PAIRS)
        is_pair_R = pair_R < R
        in_pairs_HR = is_head_H[:, None] & is_pair_R[None, :]
        first_R = K - 2 * R + pair_R
        first_HR = tl.load(x_H[:, None] + first_R[None, :], mask=in_pairs_HR, other=0.0).to(tl.float32)
        second_HR = tl.load(x_H[:, None] + (first_R + R)[None, :], mask=in_pairs_HR, other=0.0).to(tl.float32)
        squares_H += tl.sum(first_HR * first_HR + second_HR * second_HR, 1)
    square_H = squares_H / K + eps
    if K > 2 * R:
        if weight is not None:
            still_HS = _normed(still_HS, square_H, weight, column_S, is_still_S, dtype)
        still_HS = _scaled(still_HS, scale, dtype)
        tl.store(out_H[:, None] + column_S[None, :], still_HS.to(dtype), mask=in_still_HS)
    if R > 0:
        if weight is not None:
            first_HR = _normed(first_HR, square_H, weight, first_R, is_pair_R, dtype)
            second_HR = _normed(second_HR, square_H, weight, first_R + R, is_pair_R, dtype)
        at_R = b * table_batch + t * R + pair_R
        cosine_1R = tl.load(cosine + at_R, mask=is_pair_R, other=0.0)[None, :]
        sine_1R = tl.load(sine + at_R, mask=is_pair_R, other=0.0)[None, :]
        turned_HR = _scaled(_rounded(first_HR * cosine_1R - second_HR * sine_1R, dtype), scale, dtype)
        tl.store(out_H[:, None] + first_R[None, :], turned_HR.to(dtype), mask=in_pairs_HR)
        turned_HR = _scaled(_rounded(second_HR * cosine_1R + first_HR * sine_1R, dtype), scale, dtype)
        tl.store(out_H[:, None] + (first_R + R)[None, :], turned_HR.to(dtype), mask=in_pairs_HR)


@triton.jit(do_not_specialize=["T"])
def _merge(
    x, weight, gate, out, eps, T, x_batch, x_token, x_head, gate_row,
    H: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Norm all heads of one token together, and multiply them by the sigmoid of its gate."""
    token = tl.program_id(0).to(tl.int64)
    head_H1 = tl.arange(0, HEADS).to(tl.int64)[:, None]
    column_1V = tl.arange(0, COLUMNS)[None, :]
    inside_HV = (head_H1 < H) & (column_1V < V)
    at_HV = head_H1 * V + column_1V
    dtype: tl.constexpr = out.dtype.element_ty
    x += (token // T) * x_batch + (token % T) * x_token
    x_HV = tl.load(x + head_H1 * x_head + column_1V, mask=inside_HV, other=0.0).to(tl.float32)
    if weight is not None:
        inverse = tl.rsqrt(tl.sum(x_HV * x_HV) / (H * V) + eps)
        weight_HV = tl.load(weight + at_HV, mask=inside_HV, other=0.0).to(tl.float32)
        x_HV = _rounded(_rounded(x_HV * inverse, dtype) * weight_HV, dtype)
    if gate is not None:
        gate_HV = tl.load(gate + token * gate_row + at_HV, mask=inside_HV, other=0.0).to(tl.float32)
        x_HV *= _rounded(1 / (1 + tl.exp(-gate_HV)), dtype)
    tl.store(out + token * H * V + at_HV, x_HV.to(dtype), mask=inside_HV)


# fmt: on


def _like(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@gpu.operator("pointwise_triton_rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _like)
def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `sala.ops.pointwise`, as all of these."""
    out = _like(x)
    _launch_norm(x, None, weight_D, None, out, 0.0, eps)
    return out


def _pair(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x)


@gpu.operator(
    "pointwise_triton_add_rms_norm(Tensor x, Tensor branch, float scale, Tensor weight, float eps) -> (Tensor, Tensor)",
    _pair,
)
def add_rms_norm(x: Tensor, branch: Tensor, scale: float, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, out = _pair(x)
    _launch_norm(x, branch, weight_D, total, out, scale, eps)
    return total, out


def _launch_norm(
    x: Tensor, branch: Tensor | None, weight_D: Tensor, total: Tensor | None, out: Tensor, scale: float, eps: float
) -> None:
    if not out.numel():
        return
    (x, x_row), (branch, branch_row) = rows(x), (None, 0) if branch is None else rows(branch)
    width = x.shape[-1]
    columns = triton.next_power_of_2(width)
    tile = triton.cdiv(BLOCK, columns)
    _norm[(triton.cdiv(count(x), tile),)](
        *(x, branch, weight_D.contiguous(), total, out, scale, eps, count(x), x_row, branch_row),
        *(width, tile, columns),
        num_warps=_warps(tile * columns),
    )


@gpu.operator("pointwise_triton_add_scaled(Tensor x, Tensor branch, float scale) -> Tensor", _like)
def add_scaled(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    out = _like(x)
    _launch_combine(x, branch, out, scale, silu=False)
    return out


@gpu.operator("pointwise_triton_silu_mul(Tensor gate, Tensor up) -> Tensor", _like)
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    out = _like(gate)
    _launch_combine(gate, up, out, 1.0, silu=True)
    return out


def _launch_combine(x: Tensor, other: Tensor, out: Tensor, scale: float, *, silu: bool) -> None:
    if not out.numel():
        return
    (x, x_row), (other, other_row) = rows(x), rows(other)
    width = x.shape[-1]
    columns = min(BLOCK, triton.next_power_of_2(width))
    _combine[(count(x) * triton.cdiv(width, columns),)](
        x, other, out, scale, x_row, other_row, width, columns, silu, num_warps=_warps(columns)
    )


@gpu.operator(
    "pointwise_triton_norm_rotate(Tensor x, Tensor? weight, float eps, Tensor? cosine, Tensor? sine, Tensor? scale) "
    "-> Tensor",
    _like,
)
def norm_rotate(
    x_BTHK: Tensor,
    weight_K: Tensor | None,
    eps: float,
    cosine_BTR: Tensor | None,
    sine_BTR: Tensor | None,
    scale_BT: Tensor | None,
) -> Tensor:
    out = _like(x_BTHK)
    if not out.numel():
        return out
    x = close(x_BTHK)
    B, T, H, K = x.shape
    pairs = 0 if cosine_BTR is None else cosine_BTR.shape[-1]
    table_batch = 0 if cosine_BTR is None or cosine_BTR.shape[0] == 1 else T * pairs
    scale_batch = 0 if scale_BT is None or scale_BT.shape[0] == 1 else T
    width = triton.next_power_of_2(K)
    heads = min(triton.next_power_of_2(H), max(1, TURN_ELEMENTS // width))
    _turn[B * T, triton.cdiv(H, heads)](
        *(x, contiguous(weight_K), contiguous(cosine_BTR), contiguous(sine_BTR), contiguous(scale_BT), out, eps),
        *(T, H, *x.stride()[:3], table_batch, scale_batch),
        *(K, pairs, heads, triton.next_power_of_2(max(1, K - 2 * pairs)), triton.next_power_of_2(max(1, pairs))),
        num_warps=_warps(heads * width),
    )
    return out


def _merged(x_BTHV: Tensor, *_: object) -> Tensor:
    B, T, H, V = x_BTHV.shape
    return x_BTHV.new_empty(B, T, H * V)


@gpu.operator("pointwise_triton_norm_gate(Tensor x, Tensor? weight, float eps, Tensor? gate) -> Tensor", _merged)
def norm_gate(x_BTHV: Tensor, weight_D: Tensor | None, eps: float, gate_BTD: Tensor | None) -> Tensor:
    out = _merged(x_BTHV)
    if not out.numel():
        return out
    x = close(x_BTHV)
    B, T, H, V = x.shape
    gate, gate_row = (None, 0) if gate_BTD is None else rows(gate_BTD)
    heads, columns = triton.next_power_of_2(H), triton.next_power_of_2(V)
    _merge[(B * T,)](
        *(x, contiguous(weight_D), gate, out, eps, T, *x.stride()[:3], gate_row),
        *(H, V, heads, columns),
        num_warps=_warps(heads * columns),
    )
    return out


def _warps(elements: int) -> int:
    return min(32, max(1, triton.next_power_of_2(elements) // (32 * THREAD_ELEMENTS)))
