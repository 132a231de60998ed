"""The elementwise work between matrix products and attention: norms, rotation, gates and residuals, in one pass each.

Every step is rounded to the tensors' dtype where plain torch rounds it, so that a backend is a matter of speed: norms and
rotation are computed in float32, a norm is rounded before its weight multiplies it, a sigmoid before it does.
"""

import torch
from torch import Tensor

from sala.errors import InputError
from sala.ops.checks import check_devices, check_dtype

# imported here and not on first use: torch.compile cannot trace an import
from sala.ops.dispatch import choose
from sala.ops.pointwise import eager as _eager  # noqa: F401

__all__ = ["add_rms_norm", "add_scaled", "norm_gate", "norm_rotate", "rms_norm", "silu_mul"]

# `backend` in all of them: a name in `sala.ops.dispatch.BACKENDS["pointwise"]`, or "auto"; BackendError for others.


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps), over the last dimension (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    Args:
        x: (..., D), any floating dtype.
        weight_D: multiplies the norm, rounded to x's dtype before (no "+ 1").
        eps: added to the mean square.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    _check_numbers(x, weight=weight_D)
    _check_weight(weight_D, x.shape[-1])
    return choose("pointwise", backend, (x, weight_D)).rms_norm(x, weight_D, eps)


def add_scaled(x: Tensor, branch: Tensor, scale: float, *, backend: str = "auto") -> Tensor:
    """Return x + scale * branch, tensors of one shape (..., D): the end of a residual branch (muP).

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    _check_same(x, branch)
    return choose("pointwise", backend, (x, branch)).add_scaled(x, branch, scale)


def add_rms_norm(
    x: Tensor, branch: Tensor, scale: float, weight_D: Tensor, eps: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return sum = x + scale * branch and rms_norm(sum): the end of a residual branch and the start of the next.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    _check_same(x, branch)
    _check_numbers(x, weight=weight_D)
    _check_weight(weight_D, x.shape[-1])
    return choose("pointwise", backend, (x, branch, weight_D)).add_rms_norm(x, branch, scale, weight_D, eps)


def norm_rotate(
    x_BTHK: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
    scale_BT: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return queries or keys as attention takes them: each head normed, then rotated, then scaled by its token's factor.

    Each of the three is left out when it is not given.

    Args:
        x_BTHK: (B, T, H, K) projections.
        norm: weight (K,) and eps of the norm over each head, see `rms_norm`.
        rotation: cosine and sine, float32 (B or 1, T, R) with 2 R <= K: the pairs (i, i + R) of a head's last 2 R numbers
            turn by these, in float32; what stands before them stays (Su et al., arXiv 2104.09864, in half-split pairs).
        scale_BT: float32 (B or 1, T), rounded to x's dtype before it multiplies.

    Returns:
        (B, T, H, K) in x's dtype. In memory the tokens of a head may stand together.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    if x_BTHK.ndim != 4:
        raise InputError(f"heads must be (B, T, H, K), not {tuple(x_BTHK.shape)}")
    B, T, _, K = x_BTHK.shape
    weight_K, eps = norm or (None, 0.0)
    if weight_K is not None:
        _check_weight(weight_K, K)
    _check_numbers(x_BTHK, weight=weight_K, scale=scale_BT)
    cosine_BTR = sine_BTR = None
    if rotation is not None:
        cosine_BTR, sine_BTR = rotation
        _check_numbers(x_BTHK, cosine=cosine_BTR, sine=sine_BTR)
        _check_table("cosine", cosine_BTR, B, T)
        _check_table("sine", sine_BTR, B, T)
        if cosine_BTR.ndim != 3 or cosine_BTR.shape != sine_BTR.shape or 2 * cosine_BTR.shape[-1] > K:
            raise InputError(
                f"cosine and sine must be (B or 1, T, R) with 2 R at most the head width {K}, "
                f"not {tuple(cosine_BTR.shape)} and {tuple(sine_BTR.shape)}"
            )
    if scale_BT is not None:
        _check_table("scale", scale_BT, B, T)
        if scale_BT.ndim != 2:
            raise InputError(f"scale must be (B or 1, T), not {tuple(scale_BT.shape)}")
    if weight_K is None and cosine_BTR is None and scale_BT is None:
        return x_BTHK
    implementation = choose("pointwise", backend, (x_BTHK, weight_K))
    return implementation.norm_rotate(x_BTHK, weight_K, eps, cosine_BTR, sine_BTR, scale_BT)


def norm_gate(
    x_BTHV: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    gate_BTD: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return what attention gives a token, its heads end to end: normed, then times sigmoid(gate).

    Either is left out when it is not given.

    Args:
        x_BTHV: (B, T, H, V), in memory in any order of tokens and heads.
        norm: weight (H V,) and eps of the norm over all heads at once, see `rms_norm`.
        gate_BTD: what the sigmoid is taken of.

    Returns:
        (B, T, D) in x's dtype.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    if x_BTHV.ndim != 4:
        raise InputError(f"heads must be (B, T, H, V), not {tuple(x_BTHV.shape)}")
    B, T, H, V = x_BTHV.shape
    weight_D, eps = norm or (None, 0.0)
    _check_numbers(x_BTHV, weight=weight_D, gate=gate_BTD)
    if weight_D is not None:
        _check_weight(weight_D, H * V)
    if gate_BTD is not None and gate_BTD.shape != (B, T, H * V):
        raise InputError(
            f"the gate must be {(B, T, H * V)} for heads {tuple(x_BTHV.shape)}, not {tuple(gate_BTD.shape)}"
        )
    return choose("pointwise", backend, (x_BTHV, weight_D, gate_BTD)).norm_gate(x_BTHV, weight_D, eps, gate_BTD)


def silu_mul(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """Return silu(gate) * up, tensors of one shape (..., F) (SwiGLU; Shazeer, arXiv 2002.05202, equation 6).

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    _check_same(gate, up)
    return choose("pointwise", backend, (gate, up)).silu_mul(gate, up)


def _check_weight(weight: Tensor, width: int) -> None:
    if weight.shape != (width,):
        raise InputError(f"the weight of a norm over {width} numbers must be ({width},), not {tuple(weight.shape)}")


def _check_numbers(x: Tensor, **others: Tensor | None) -> None:
    check_dtype("tensors", x, *others.values())
    check_devices(x=x, **others)


def _check_same(x: Tensor, other: Tensor) -> None:
    _check_numbers(x, other=other)
    if x.shape != other.shape:
        raise InputError(f"tensors of one shape are needed, not {tuple(x.shape)} and {tuple(other.shape)}")


def _check_table(name: str, table: Tensor, B: int, T: int) -> None:
    if table.dtype != torch.float32 or table.shape[0] not in (1, B) or table.shape[1] != T:
        raise InputError(
            f"{name} must be float32 and start with (B or 1, T) = ({B}, {T}), not {table.dtype} of {tuple(table.shape)}"
        )
