"""The elementwise work in C++: see `sala/ops/native/pointwise.cpp`."""

import torch
from torch import Tensor

from sala.ops.native import Function, operator
from sala.ops.pointwise.layout import close, contiguous, count, rows

_norm = Function("sala_norm", "iii pi pi f p f pp i")
_turn = Function("sala_turn", "iiiii piii pf ppii pi p i")
_merge = Function("sala_merge", "iiiii piii pf pi p i")
_silu_mul = Function("sala_silu_mul", "iii pi pi p i")


def _fake_like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@operator("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _fake_like)
def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `sala.ops.pointwise`, as all of these."""
    x, row = rows(x)
    out = _fake_like(x)
    weight_D = weight_D.contiguous()
    n = x.shape[-1]
    _norm(
        _kind(x), count(x), n, x.data_ptr(), row, None, 0, 0.0,
        weight_D.data_ptr(), eps, None, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


@operator("add_scaled(Tensor x, Tensor branch, float scale) -> Tensor", _fake_like)
def add_scaled(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    (x, row), (branch, branch_row) = rows(x), rows(branch)
    total = _fake_like(x)
    _norm(
        _kind(x), count(x), x.shape[-1], x.data_ptr(), row, branch.data_ptr(), branch_row, scale,
        None, 0.0, total.data_ptr(), None, torch.get_num_threads(),
    )  # fmt: skip
    return total


def _fake_pair(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _fake_like(x), _fake_like(x)


@operator(
    "add_rms_norm(Tensor x, Tensor branch, float scale, Tensor weight, float eps) -> (Tensor, Tensor)", _fake_pair
)
def add_rms_norm(x: Tensor, branch: Tensor, scale: float, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    (x, row), (branch, branch_row) = rows(x), rows(branch)
    total, out = _fake_pair(x)
    weight_D = weight_D.contiguous()
    _norm(
        _kind(x), count(x), x.shape[-1], x.data_ptr(), row, branch.data_ptr(), branch_row, scale,
        weight_D.data_ptr(), eps, total.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return total, out


def _fake_heads(x_BTHK: Tensor, *_: object) -> Tensor:
    """Empty (B, T, H, K), the tokens of a head together."""
    B, T, H, K = x_BTHK.shape
    if T == 1:
        return _fake_like(x_BTHK)
    return x_BTHK.new_empty((B, H, T, K)).transpose(1, 2)


@operator(
    "norm_rotate(Tensor x, Tensor? weight, float eps, Tensor? cosine, Tensor? sine, Tensor? scale) -> Tensor",
    _fake_heads,
)
def norm_rotate(
    x_BTHK: Tensor,
    weight_K: Tensor | None,
    eps: float,
    cosine_BTR: Tensor | None,
    sine_BTR: Tensor | None,
    scale_BT: Tensor | None,
) -> Tensor:
    x = close(x_BTHK)
    out = _fake_heads(x)
    weight, cosine, sine, scale = (
        contiguous(weight_K),
        contiguous(cosine_BTR),
        contiguous(sine_BTR),
        contiguous(scale_BT),
    )
    B, T, H, K = x.shape
    half = 0 if cosine is None else cosine.shape[-1]
    table_b = 0 if cosine is None or cosine.shape[0] == 1 else T * half
    scale_b = 0 if scale is None or scale.shape[0] == 1 else T
    _turn(
        _kind(x), B, T, H, K, x.data_ptr(), *x.stride()[:3], _address(weight), eps,
        _address(cosine), _address(sine), table_b, half, _address(scale), scale_b, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _fake_merged(x_BTHV: Tensor, *_: object) -> Tensor:
    B, T, H, V = x_BTHV.shape
    return x_BTHV.new_empty((B, T, H * V))


@operator("norm_gate(Tensor x, Tensor? weight, float eps, Tensor? gate) -> Tensor", _fake_merged)
def norm_gate(x_BTHV: Tensor, weight_D: Tensor | None, eps: float, gate_BTD: Tensor | None) -> Tensor:
    x = close(x_BTHV)
    out = _fake_merged(x)
    weight = contiguous(weight_D)
    gate, gate_row = (None, 0) if gate_BTD is None else rows(gate_BTD)
    B, T, H, V = x.shape
    _merge(
        _kind(x), B, T, H, V, x.data_ptr(), *x.stride()[:3], _address(weight), eps,
        _address(gate), gate_row, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


@operator("silu_mul(Tensor gate, Tensor up) -> Tensor", _fake_like)
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    (gate, gate_row), (up, up_row) = rows(gate), rows(up)
    out = _fake_like(gate)
    _silu_mul(
        _kind(gate), count(gate), gate.shape[-1], gate.data_ptr(), gate_row, up.data_ptr(), up_row,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _kind(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
