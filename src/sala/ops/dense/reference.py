"""The definition of dense attention: token by token, head by head, in float64; no tricks, for tests."""

import torch
from torch import Tensor


def attend(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_BT: Tensor | None, scale: float, start: int | None
) -> Tensor:
    """Return (B, T, H, V) in v's dtype, differentiable; see `dense_attention`."""
    B, T, H, _ = q_BTHK.shape
    G, V = v_BSGV.shape[2:]
    out_BTHV = torch.zeros(B, T, H, V, dtype=torch.float64, device=q_BTHK.device)
    for b in range(B):
        for t in range(T):
            position = start + t if start is not None else int(positions_BT[b, t])  # type: ignore[index]
            for h in range(H) if position >= 0 else ():
                g = h // (H // G)
                scores_s = scale * k_BSGK[b, : position + 1, g].double() @ q_BTHK[b, t, h].double()
                out_BTHV[b, t, h] = scores_s.softmax(0) @ v_BSGV[b, : position + 1, g].double()
    return out_BTHV.to(v_BSGV.dtype)


def attend_static(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_BT: Tensor, scale: float) -> Tensor:
    """See `dense_attention`; it reads the positions all the same."""
    return attend(q_BTHK, k_BSGK, v_BSGV, positions_BT, scale, None)
