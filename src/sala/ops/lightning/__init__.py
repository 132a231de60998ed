"""Lightning attention: linear attention with a fixed exponential decay per head."""

import math

import torch
from torch import Tensor

from sala.errors import InputError
from sala.ops.checks import DTYPES, NAMES, check_devices
from sala.ops.context import Context

# imported here and not on first use: torch.compile cannot trace an import
from sala.ops.dispatch import choose, takes
from sala.ops.lightning import cpu as _cpu  # noqa: F401
from sala.ops.lightning import eager as _eager  # noqa: F401
from sala.ops.lightning import part
from sala.ops.packing import row_bounds

__all__ = ["lightning_attention", "log_decay", "log_decays"]


def log_decay(num_heads: int) -> Tensor:
    """Return `log_decays` as a tensor (H,) float32.

    Raises:
        InputError: no heads.
    """
    return torch.tensor(log_decays(num_heads), dtype=torch.float32)


def log_decays(num_heads: int) -> tuple[float, ...]:
    """Return the logarithm of each head's decay per token, H numbers, all negative.

    Minus the ALiBi slopes, 2^(-8 (h+1) / H), the same for every layer; for an H that is no power of two, those of
    the next lower power P followed by every second one of 2P. (Press et al., "Train Short, Test Long", section 3
    and its code; MiniCPM-SALA and HALO use them without a factor for the layer.)

    Raises:
        InputError: no heads.
    """
    if num_heads < 1:
        raise InputError(f"num_heads must be at least 1, not {num_heads}")
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4 * (head + 1) / power) for head in range(0, 2 * power, 2)][: num_heads - power]
    return tuple(-slope for slope in slopes)


def lightning_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_H: Tensor,
    *,
    scale: float,
    initial_state_BHKV: Tensor | None = None,
    mask_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    context: Context | None = None,
    slots_2B: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run linear attention with decay over T tokens; with T = 1 and a state, it is the decoding step.

        S_t = exp(log_decay) S_{t-1} + k_t v_t^T        decay first, then add
        o_t = scale S_t^T q_t                           the updated state

    (Qin et al., "Lightning Attention-2", equations 3-6; MiniCPM-SALA, section 2: no normaliser, no activation.)

    Args:
        q_BTHK, k_BTHK, v_BTHV: float32, bfloat16, float16 or float64, one dtype for the three.
        log_decay_H: float32 (or float64), finite, none above zero, which is checked on the CPU; see `log_decays`.
        scale: multiplies the queries, usually K**-0.5.
        initial_state_BHKV: float32 (float64 for float64 inputs), zeros when left out; not changed.
        mask_BT: bool; a False token neither adds to the state nor decays it, its output is zero, its values may be
            anything, NaN included.
        cu_seqlens: (N+1,) int32 or int64: the one batch row is N rows end to end, each with a state of its own.
        cu_seqlens_cpu: the same on the CPU, where `cu_seqlens` is on a device already: then nothing is read or sent.
        context: the ranks that hold the packed row together: q, k and v are this rank's part of it, `cu_seqlens` are
            those of the whole row; without a mask and without initial states.
        slots_2B: (2, B) int64: then `initial_state` is a pool of states, (N, H, K, V), contiguous, which is changed and
            returned: row b starts from the state in slot `slots[0, b]`, from zeros if that is negative, and writes its
            final state to slot `slots[1, b]`. No slot is written twice, or by one row and read by another. Without
            gradients, `cu_seqlens` and context.
        backend: a name in `sala.ops.dispatch.BACKENDS["lightning"]`, or "auto".

    Returns:
        out (B, T, H, V) in the dtype of `v`; final state (B, H, K, V), float32 (float64 for float64 inputs). With
        `cu_seqlens` states are (N, H, K, V); with a context they are those behind the last token here of the rows from the
        first to the last that has any here.

    Raises:
        InputError: shapes, dtypes, devices or values that do not fit.
        BackendError: no such backend.
    """
    if slots_2B is not None:
        return _attend_in_slots(
            *(q_BTHK, k_BTHK, v_BTHV, log_decay_H, scale, initial_state_BHKV, mask_BT, slots_2B, backend)
        )
    _check(q_BTHK, k_BTHK, v_BTHV, log_decay_H, initial_state_BHKV, mask_BT, cu_seqlens, cu_seqlens_cpu, context)
    tensors = (q_BTHK, k_BTHK, v_BTHV, log_decay_H, initial_state_BHKV, mask_BT)
    attend = choose("lightning", backend, tensors).attend
    if cu_seqlens is not None:
        cu_seqlens_cpu = cu_seqlens.cpu() if cu_seqlens_cpu is None else cu_seqlens_cpu
        # to a GPU without waiting for it
        cu_seqlens = cu_seqlens.to(q_BTHK.device, non_blocking=q_BTHK.is_cuda)
    if context is not None:
        assert cu_seqlens is not None and cu_seqlens_cpu is not None
        return part.attend(
            attend,
            q_BTHK,
            k_BTHK,
            v_BTHV,
            log_decay_H,
            scale=scale,
            cu_seqlens=cu_seqlens,
            cu_seqlens_cpu=cu_seqlens_cpu,
            context=context,
        )
    return attend(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        log_decay_H,
        scale=scale,
        initial_state_BHKV=initial_state_BHKV,
        mask_BT=mask_BT,
        cu_seqlens=cu_seqlens,
    )


def _attend_in_slots(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    log_decay_H: Tensor,
    scale: float,
    pool_NHKV: Tensor | None,
    mask_BT: Tensor | None,
    slots_2B: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, T, H, K = q_BTHK.shape
    sizes = (H, K, v_BTHV.shape[-1])
    if pool_NHKV is None or pool_NHKV.shape[1:] != sizes or not pool_NHKV.is_contiguous():
        raise InputError(
            f"slots of states {None if pool_NHKV is None else tuple(pool_NHKV.shape)}; expected a contiguous pool (N, H, K, V) "
            f"with (H, K, V) = {sizes}"
        )
    if slots_2B.shape != (2, B) or slots_2B.dtype != torch.int64 or slots_2B.device != pool_NHKV.device:
        raise InputError(
            f"slots are {slots_2B.dtype} of shape {tuple(slots_2B.shape)} on {slots_2B.device}; expected int64 of shape "
            f"{(2, B)} on {pool_NHKV.device}"
        )
    if slots_2B.is_cpu and not torch.compiler.is_compiling():
        lowest, highest = (int(x) for x in slots_2B.aminmax())
        if highest >= len(pool_NHKV) or lowest < -1 or bool((slots_2B[1] < 0).any()):
            raise InputError(
                f"slots {slots_2B.tolist()} of a pool of {len(pool_NHKV)}; expected 0 to {len(pool_NHKV) - 1}"
            )
    _check(q_BTHK, k_BTHK, v_BTHV, log_decay_H, pool_NHKV[:1].expand(B, -1, -1, -1), mask_BT, None, None, None)
    implementation = choose("lightning", backend, (q_BTHK, k_BTHK, v_BTHV, log_decay_H, pool_NHKV, mask_BT))
    options = {"scale": scale, "mask_BT": mask_BT, "cu_seqlens": None}
    if T == 1 and takes("lightning", implementation, "slots"):
        return implementation.attend(
            q_BTHK, k_BTHK, v_BTHV, log_decay_H, initial_state_BHKV=pool_NHKV, slots_2B=slots_2B, **options
        )
    read_B, write_B = slots_2B
    initial_BHKV = pool_NHKV[read_B.clamp(min=0)].masked_fill_((read_B < 0)[:, None, None, None], 0)
    out_BTHV, final_BHKV = implementation.attend(
        q_BTHK, k_BTHK, v_BTHV, log_decay_H, initial_state_BHKV=initial_BHKV, **options
    )
    return out_BTHV, pool_NHKV.index_copy_(0, write_B, final_BHKV)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay_H: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    context: Context | None,
) -> None:
    """Refuse whatever a backend would turn into a wrong number or an error about something else."""
    if q.ndim != 4 or v.ndim != 4:
        raise InputError(f"q and v must be (B, T, H, width), not {tuple(q.shape)} and {tuple(v.shape)}")
    B, T, H, K = q.shape
    V = v.shape[-1]
    if k.shape != q.shape:
        raise InputError(f"k must have the shape of q, {(B, T, H, K)}, not {tuple(k.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise InputError(f"v must be (B, T, H, V) with (B, T, H) = {(B, T, H)} as in q, not {tuple(v.shape)}")
    if T == 0:
        raise InputError("lightning_attention needs at least one token, T = 0")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q, k and v must share one dtype of {NAMES}, not {q.dtype}, {k.dtype}, {v.dtype}")
    if log_decay_H.shape != (H,):
        raise InputError(f"log_decay must have one value per head, ({H},), not {tuple(log_decay_H.shape)}")
    if log_decay_H.dtype not in (torch.float32, torch.float64):
        # a model cast to bfloat16 casts its buffers too
        raise InputError(f"log_decay must be float32, not {log_decay_H.dtype}: a rounded slope is another decay")
    # a graph cannot look at a value, and on a device looking waits for all the work before it
    can_look = log_decay_H.is_cpu and not torch.compiler.is_compiling()
    if can_look and not all(-math.inf < value <= 0 for value in log_decay_H.tolist()):
        lowest, highest = (extreme.item() for extreme in log_decay_H.aminmax())
        raise InputError(
            f"log_decay must be finite and not above zero, not {lowest} to {highest}: pass minus the slope"
        )
    if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
        raise InputError(f"mask must be bool of shape {(B, T)}, not {mask.dtype} of shape {tuple(mask.shape)}")
    if context is not None and (cu_seqlens is None or mask is not None or initial_state is not None):
        raise InputError("ranks share a packed row: with a context give cu_seqlens, and neither a mask nor a state")
    num_rows = B
    if cu_seqlens_cpu is not None and not _is_copy(cu_seqlens_cpu, cu_seqlens):
        raise InputError(
            f"cu_seqlens_cpu must be cu_seqlens, {None if cu_seqlens is None else cu_seqlens.tolist()}, on the CPU, "
            f"not {cu_seqlens_cpu}"
        )
    if cu_seqlens is not None:
        if B != 1:
            raise InputError(f"packed rows are one batch row: with cu_seqlens B must be 1, not {B}")
        bounds = cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu
        num_rows = len(row_bounds(bounds, T if context is None else T * context.ranks)) - 1
    if initial_state is not None:
        if initial_state.shape != (num_rows, H, K, V):
            raise InputError(f"the state must be {(num_rows, H, K, V)}, not {tuple(initial_state.shape)}")
        state_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        if initial_state.dtype != state_dtype:
            raise InputError(f"the state must be {state_dtype}, not {initial_state.dtype}: a rounded state drifts")
    check_devices(q=q, k=k, v=v, log_decay=log_decay_H, state=initial_state, mask=mask)


def _is_copy(cu_seqlens_cpu: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether one may be the other's copy on the CPU; what lies on a device is not waited for."""
    if cu_seqlens is None or not cu_seqlens_cpu.is_cpu or cu_seqlens_cpu.shape != cu_seqlens.shape:
        return False
    # mostly the same tensor
    return cu_seqlens is cu_seqlens_cpu or not cu_seqlens.is_cpu or cu_seqlens.tolist() == cu_seqlens_cpu.tolist()
