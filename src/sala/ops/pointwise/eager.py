"""The elementwise work in plain torch: differentiable, on any device, of any floating dtype."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """See `sala.ops.pointwise`, as all of these."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight_D


def add_scaled(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    return x + branch * scale


def add_rms_norm(x: Tensor, branch: Tensor, scale: float, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = add_scaled(x, branch, scale)
    return total, rms_norm(total, weight_D, eps)


def norm_rotate(
    x_BTHK: Tensor,
    weight_K: Tensor | None,
    eps: float,
    cosine_BTR: Tensor | None,
    sine_BTR: Tensor | None,
    scale_BT: Tensor | None,
) -> Tensor:
    if weight_K is not None:
        x_BTHK = rms_norm(x_BTHK, weight_K, eps)
    if cosine_BTR is not None and sine_BTR is not None:
        x_BTHK = _rotate(x_BTHK, cosine_BTR[:, :, None], sine_BTR[:, :, None])
    if scale_BT is not None:
        x_BTHK = x_BTHK * scale_BT[:, :, None, None].to(x_BTHK.dtype)
    return x_BTHK


def _rotate(x_BTHK: Tensor, cosine_BT1R: Tensor, sine_BT1R: Tensor) -> Tensor:
    turning = 2 * cosine_BT1R.shape[-1]
    still, x = x_BTHK.split((x_BTHK.shape[-1] - turning, turning), dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosine_BT1R - second * sine_BT1R, second * cosine_BT1R + first * sine_BT1R), dim=-1).to(
        x_BTHK.dtype
    )
    return torch.cat((still, turned), dim=-1) if still.shape[-1] else turned


def norm_gate(x_BTHV: Tensor, weight_D: Tensor | None, eps: float, gate_BTD: Tensor | None) -> Tensor:
    x_BTD = x_BTHV.flatten(2)
    if weight_D is not None:
        x_BTD = rms_norm(x_BTD, weight_D, eps)
    return x_BTD if gate_BTD is None else x_BTD * torch.sigmoid(gate_BTD)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return silu(gate) * up
