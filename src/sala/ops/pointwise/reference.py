"""The definition of the elementwise work: the formulas in float64, rounded once at the end."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `sala.ops.pointwise`, as all of these."""
    return _norm(x.double(), weight_D, eps).to(x.dtype)


def add_scaled(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    return (x.double() + scale * branch.double()).to(x.dtype)


def add_rms_norm(x: Tensor, branch: Tensor, scale: float, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x.double() + scale * branch.double()
    return total.to(x.dtype), _norm(total, weight_D, eps).to(x.dtype)


def norm_rotate(
    x_BTHK: Tensor,
    weight_K: Tensor | None,
    eps: float,
    cosine_BTR: Tensor | None,
    sine_BTR: Tensor | None,
    scale_BT: Tensor | None,
) -> Tensor:
    x = x_BTHK.double()
    if weight_K is not None:
        x = _norm(x, weight_K, eps)
    if cosine_BTR is not None and sine_BTR is not None:
        R = cosine_BTR.shape[-1]
        # a pair is a complex number, and turning it a product with cos + i sin
        turn_BT1R = torch.complex(cosine_BTR.double(), sine_BTR.double())[:, :, None]
        still, first, second = x.split((x.shape[-1] - 2 * R, R, R), dim=-1)
        pairs = torch.complex(first, second) * turn_BT1R
        x = torch.cat((still, pairs.real, pairs.imag), dim=-1)
    if scale_BT is not None:
        x = x * scale_BT.double()[:, :, None, None]
    return x.to(x_BTHK.dtype)


def norm_gate(x_BTHV: Tensor, weight_D: Tensor | None, eps: float, gate_BTD: Tensor | None) -> Tensor:
    x = x_BTHV.double().flatten(2)
    if weight_D is not None:
        x = _norm(x, weight_D, eps)
    if gate_BTD is not None:
        x = x / (1 + (-gate_BTD.double()).exp())
    return x.to(x_BTHV.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    wide = gate.double()
    return (wide / (1 + (-wide).exp()) * up.double()).to(gate.dtype)


def _norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight_D.double()
