"""Lightning attention over one rank's part of a packed row: states flow between ranks, tokens do not.

Rank r holds tokens r T to (r + 1) T - 1. It runs over the documents in its part from states of zeros; S_r is the state
behind its last token. Let the document of its first token begin at token d of the row. What that document left on the
ranks before is, for a state is linear in what was added to it,

    S_in = sum over the ranks p < r with (p + 1) T > d of  exp(log_decay (r - 1 - p) T) S_p

and the document's n tokens here, t = 0 .. n - 1, read it besides what they read:

    o_t += scale exp(log_decay (t + 1)) S_in^T q_t         S after them += exp(log_decay n) S_in

The other ranks are in the sum too, with a weight of zero: see `sala.ops.context.Context`. Autograd differentiates all of
it; every exponent is at most zero, so that a weight may vanish but not overflow.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable

import torch
from torch import Tensor

from sala.ops.context import Context
from sala.ops.packing import spans_of


def attend(
    attend_rows: Callable[..., tuple[Tensor, Tensor]],
    q_1THK: Tensor,
    k_1THK: Tensor,
    v_1THV: Tensor,
    log_decay_H: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor,
    context: Context,
) -> tuple[Tensor, Tensor]:
    """See `sala.ops.lightning.lightning_attention`; `attend_rows` is a backend's."""
    T = q_1THK.shape[1]
    here = context.rank * T
    spans = spans_of(cu_seqlens_cpu, T, context)
    # the rows from the one that the first token here belongs to, to that of the last
    bounds = cu_seqlens_cpu.tolist()
    first, behind = bisect_right(bounds, here) - 1, bisect_left(bounds, here + T)
    own_bounds = (cu_seqlens[first : behind + 1] - here).clamp(0, T)
    out_1THV, states_NHKV = attend_rows(
        q_1THK,
        k_1THK,
        v_1THV,
        log_decay_H,
        scale=scale,
        initial_state_BHKV=None,
        mask_BT=None,
        cu_seqlens=own_bounds,
    )
    log_decay_H = log_decay_H.to(states_NHKV.dtype)
    states_RHKV = context.gather(states_NHKV[-1])
    ranks_R = torch.arange(context.ranks, device=log_decay_H.device)
    counts_R = (ranks_R < context.rank) & ((ranks_R + 1) * T > spans[0].document_start)
    tokens_between_R = ((context.rank - 1 - ranks_R) * T).clamp_min(0)
    weights_RH = (log_decay_H * tokens_between_R[:, None]).exp() * counts_R[:, None]
    carried_HKV = torch.einsum("rh,rhkv->hkv", weights_RH, states_RHKV)

    num_reading = spans[0].end - here if spans[0].document_start < here else 0
    since_nH = log_decay_H * torch.arange(1, num_reading + 1, device=log_decay_H.device)[:, None]
    head_1nHV, rest_1rHV = out_1THV.split([num_reading, T - num_reading], dim=1)
    # unnormalised sums may pass the largest float16
    dtype = torch.float32 if q_1THK.dtype == torch.float16 else q_1THK.dtype
    read_1nHV = torch.einsum("bthk,hkv->bthv", q_1THK[:, :num_reading].to(dtype), carried_HKV.to(dtype))
    head_1nHV = (head_1nHV + read_1nHV * (since_nH.exp() * scale)[..., None]).to(out_1THV.dtype)
    first_1HKV = states_NHKV[:1] + (log_decay_H * num_reading).exp()[:, None, None] * carried_HKV
    return torch.cat([head_1nHV, rest_1rHV], dim=1), torch.cat([first_1HKV, states_NHKV[1:]])
