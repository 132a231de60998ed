"""The definition of lightning attention: the recurrence, token by token, in float64."""

from itertools import pairwise

import torch
from torch import Tensor


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
    """See `sala.ops.lightning.lightning_attention`; the final state has the dtype it promises, rounded once."""
    B, T, H, K = q_BTHK.shape
    V = v_BTHV.shape[-1]
    state_dtype = torch.float64 if q_BTHK.dtype == torch.float64 else torch.float32
    if not B:
        return torch.zeros_like(v_BTHV), q_BTHK.new_zeros(B, H, K, V, dtype=state_dtype)
    rows = [(row, 0, T) for row in range(B)]
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        rows = [(0, start, end) for start, end in pairwise(bounds)]
    decay_H11 = log_decay_H.double().exp()[:, None, None]
    out = [[torch.zeros(H, V, dtype=torch.float64, device=v_BTHV.device)] * T for _ in range(B)]
    states = []
    for index, (row, start, end) in enumerate(rows):
        if initial_state_BHKV is None:
            state_HKV = torch.zeros(H, K, V, dtype=torch.float64, device=v_BTHV.device)
        else:
            state_HKV = initial_state_BHKV[index].double()
        for t in range(start, end):
            if mask_BT is not None and not mask_BT[row, t]:
                continue
            q_HK, k_HK, v_HV = (x[row, t].double() for x in (q_BTHK, k_BTHK, v_BTHV))
            state_HKV = decay_H11 * state_HKV + torch.einsum("hk,hv->hkv", k_HK, v_HV)
            out[row][t] = scale * torch.einsum("hk,hkv->hv", q_HK, state_HKV)
        states.append(state_HKV)
    out_BTHV = torch.stack([torch.stack(tokens) for tokens in out])
    return out_BTHV.to(v_BTHV.dtype), torch.stack(states).to(state_dtype)
