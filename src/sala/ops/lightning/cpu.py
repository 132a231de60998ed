"""Lightning attention in C++ (`ops/native/lightning.cpp`): the fastest on a CPU, without gradients."""

import torch
from torch import Tensor

from sala.ops import native

_PREFILL = native.Function("sala_lightning", "i piii piii piii pi p p p p p iiiii f i")
_STEP = native.Function("sala_lightning_step", "i pii pii pii p p p p p p iiii f i")


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
    slots_2B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `sala.ops.lightning.lightning_attention`.

    States are float32 throughout. bfloat16 inputs are multiplied in bfloat16 where the processor can, else in float32;
    within a chunk the state is read, and weights are applied, in the precision of the products.
    """
    if slots_2B is not None:
        assert initial_state_BHKV is not None
        pool = initial_state_BHKV
        return _step_in_slots(q_BTHK, k_BTHK, v_BTHV, log_decay_H, scale, pool, slots_2B, mask_BT), pool
    return _lightning(q_BTHK, k_BTHK, v_BTHV, log_decay_H, scale, initial_state_BHKV, mask_BT, cu_seqlens)


def _empty(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    V = v.shape[-1]
    rows = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(B, T, H, V), q.new_empty(rows, H, K, V, dtype=torch.float32)


@native.operator(
    "lightning(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor? initial, Tensor? mask, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor)",
    fake=_empty,
)
def _lightning(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, final = _empty(q, k, v, log_decay, scale, initial, mask, cu_seqlens)
    _, T, H, K = q.shape
    V = v.shape[-1]
    if final.numel() == 0:
        return out.zero_(), final
    # the library reads the last dimension, log decays and states as they stand in memory
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    log_decay = log_decay.contiguous()
    if initial is not None:
        initial = initial.contiguous()
    is_bf16, threads = q.dtype == torch.bfloat16, torch.get_num_threads()
    (q_row, q_token, q_head, _), (k_row, k_token, k_head, _), (v_row, v_token, v_head, _) = (
        x.stride() for x in (q, k, v)
    )
    initial_at = None if initial is None else initial.data_ptr()
    if T == 1 and cu_seqlens is None:
        _step(q, k, v, log_decay, scale, initial, final, out, mask, None)
        return out, final
    bounds, positions = _tokens(mask, cu_seqlens)
    if mask is not None:
        out.zero_()
    out_row = T * H * V
    if cu_seqlens is not None:
        # the rows are parts of the one batch row
        q_row = k_row = v_row = out_row = 0
    # fmt: off
    _PREFILL(
        is_bf16, q.data_ptr(), q_row, q_token, q_head, k.data_ptr(), k_row, k_token, k_head,
        v.data_ptr(), v_row, v_token, v_head, out.data_ptr(), out_row,
        log_decay.data_ptr(), initial_at, final.data_ptr(),
        None if bounds is None else bounds.data_ptr(), None if positions is None else positions.data_ptr(),
        final.shape[0], T, H, K, V, scale, threads,
    )
    # fmt: on
    return out, final


@native.operator(
    "lightning_step_in_slots(Tensor q, Tensor k, Tensor v, Tensor log_decay, float scale, Tensor(a!) pool, Tensor slots, "
    "Tensor? mask) -> Tensor",
    fake=lambda q, k, v, *_: v.new_empty(v.shape),
)
def _step_in_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    pool: Tensor,
    slots: Tensor,
    mask: Tensor | None,
) -> Tensor:
    out = v.new_empty(v.shape)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    _step(q, k, v, log_decay.contiguous(), scale, pool, pool, out, mask, slots.contiguous())
    return out


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    following: Tensor,
    out: Tensor,
    mask: Tensor | None,
    slots: Tensor | None,
) -> None:
    B, _, H, K = q.shape
    if mask is not None:
        mask = mask.contiguous()
    (q_row, _, q_head, _), (k_row, _, k_head, _), (v_row, _, v_head, _) = q.stride(), k.stride(), v.stride()
    # fmt: off
    _STEP(
        q.dtype == torch.bfloat16, q.data_ptr(), q_row, q_head, k.data_ptr(), k_row, k_head, v.data_ptr(), v_row, v_head,
        out.data_ptr(), log_decay.data_ptr(),
        None if state is None else state.data_ptr(), following.data_ptr(),
        None if mask is None else mask.data_ptr(), None if slots is None else slots.data_ptr(),
        B, H, K, v.shape[-1], scale, torch.get_num_threads(),
    )
    # fmt: on


def _tokens(mask_BT: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return where each row's tokens begin and end, (N+1,), and the tokens' positions; None: all, in their order."""
    if mask_BT is None:
        return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(), None
    before = torch.nn.functional.pad(mask_BT.flatten().cumsum(0), (1, 0))
    if cu_seqlens is None:
        bounds = before[:: mask_BT.shape[1]].contiguous()
    else:
        bounds = before[cu_seqlens]
    return bounds, mask_BT.nonzero()[:, 1].contiguous()
