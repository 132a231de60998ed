"""Lightning attention in plain torch: chunkwise, differentiable, on any device."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sala.ops.packing import pad_rows, row_bounds, similar_lengths

# within a chunk the work grows with C, between chunks with K V / C; measured best for K = 64, as good as any for 128
CHUNK = 64
# chunks in flight at once: enough for one large product instead of many small ones, and their states stay in cache
MAX_CHUNKS = 16
MAX_STATE_NUMBERS = 2**20


class Decays(NamedTuple):
    """The decay factors inside a chunk of C tokens and between n chunks; every exponent is at most zero."""

    scores_H1CC: Tensor  # from token j to token i >= j, with the query's scale; zero where j is in the future
    query_H1C1: Tensor  # from the state before the chunk to token i, with the query's scale
    key_H1C1: Tensor  # from token j to the state after the chunk
    states_HNN: Tensor  # from the state after chunk b - 1 (b = 0: before them all) to the state before chunk a


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
    """See `sala.ops.lightning.lightning_attention`.

    States are float32 throughout. bfloat16 inputs are multiplied in bfloat16, float16 in float32: outputs and
    states are unnormalised sums, and may pass 65,504.
    """
    state_dtype = torch.float64 if q_BTHK.dtype == torch.float64 else torch.float32
    log_decay_H = log_decay_H.to(state_dtype)
    if cu_seqlens is not None:
        return _packed(q_BTHK, k_BTHK, v_BTHV, log_decay_H, scale, initial_state_BHKV, mask_BT, cu_seqlens)
    if mask_BT is not None:
        return _masked(q_BTHK, k_BTHK, v_BTHV, log_decay_H, scale, initial_state_BHKV, mask_BT)
    return _rows(q_BTHK, k_BTHK, v_BTHV, log_decay_H, scale, initial_state_BHKV)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay_H: Tensor,
    scale: float,
    initial: Tensor | None,
    mask_BT: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attend over the rows of a packed row, those of similar length together."""
    _, T, H, K = q.shape
    lengths = [end - start for start, end in pairwise(row_bounds(cu_seqlens, T))]
    # what a row without tokens returns
    unchanged_NHKV = initial
    if unchanged_NHKV is None:
        zeros_HKV = torch.zeros(H, K, v.shape[-1], dtype=log_decay_H.dtype, device=q.device)
        unchanged_NHKV = zeros_HKV.expand(len(lengths), -1, -1, -1)
    is_token_BT = torch.ones(1, T, dtype=torch.bool, device=q.device) if mask_BT is None else mask_BT
    q_rows, k_rows, v_rows, is_token_rows = (x[0].split(lengths) for x in (q, k, v, is_token_BT))
    out, states = list(v_rows), list(unchanged_NHKV)
    for group in similar_lengths(lengths):
        q_NLHK, k_NLHK, v_NLHV, is_token_NL = (
            pad_rows([rows[n] for n in group]) for rows in (q_rows, k_rows, v_rows, is_token_rows)
        )
        initial_NHKV = None if initial is None else initial[group]
        if mask_BT is None and len({lengths[n] for n in group}) == 1:
            out_NLHV, states_NHKV = _rows(q_NLHK, k_NLHK, v_NLHV, log_decay_H, scale, initial_NHKV)
        else:
            out_NLHV, states_NHKV = _masked(q_NLHK, k_NLHK, v_NLHV, log_decay_H, scale, initial_NHKV, is_token_NL)
        for n, out_LHV, state_HKV in zip(group, out_NLHV, states_NHKV, strict=True):
            out[n], states[n] = out_LHV[: lengths[n]], state_HKV
    return torch.cat(out)[None], torch.stack(states)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, log_decay_H: Tensor, scale: float, initial: Tensor | None, mask_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend among the True tokens alone, by moving them to the end of their rows.

    Zeros before a row's first token leave a state of zeros as it is, whatever the decay, so the rows need no decays
    of their own. An initial state would decay there: its part, linear in it, is added afterwards.
    """
    T = mask_BT.shape[1]
    # where, not a product: a masked NaN times zero is NaN
    q, k, v = (torch.where(mask_BT[:, :, None, None], x, 0) for x in (q, k, v))
    seen_BT = mask_BT.cumsum(dim=1)
    num_tokens_B1 = seen_BT[:, -1:]
    padding_first_BT = mask_BT.to(torch.uint8).argsort(dim=1, stable=True)
    moved_q, moved_k, moved_v = (_gather_tokens(x, padding_first_BT) for x in (q, k, v))
    out_BTHV, state_BHKV = _rows(moved_q, moved_k, moved_v, log_decay_H, scale, None)
    out_BTHV = _gather_tokens(out_BTHV, (T - num_tokens_B1 + seen_BT - 1).clamp_min(0))
    if initial is not None:
        read_BTHV = torch.einsum("bthk,bhkv->bthv", q, initial.to(q.dtype))
        decay_BTH = (log_decay_H * seen_BT[:, :, None]).exp()
        out_BTHV = (out_BTHV + read_BTHV * (decay_BTH * scale)[..., None]).to(v.dtype)
        state_BHKV = state_BHKV + (log_decay_H * num_tokens_B1).exp()[:, :, None, None] * initial
    return torch.where(mask_BT[:, :, None, None], out_BTHV, 0), state_BHKV


def _gather_tokens(x_BTHK: Tensor, index_BT: Tensor) -> Tensor:
    """Return `x[b, index[b, t]]`: whole tokens, so that each is one copy."""
    B, T = index_BT.shape
    rows_B1 = torch.arange(0, B * T, T, device=index_BT.device)[:, None]
    return x_BTHK.flatten(0, 1).index_select(0, (index_BT + rows_B1).flatten()).view_as(x_BTHK)


def _rows(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, log_decay_H: Tensor, scale: float, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend over rows that are all tokens: one step, or segments of whole chunks and a last shorter chunk."""
    B, T, H, K = q_BTHK.shape
    V = v_BTHV.shape[-1]
    if T == 1:
        return _step(q_BTHK, k_BTHK, v_BTHV, log_decay_H, scale, initial)
    dtype = v_BTHV.dtype
    compute_dtype = torch.float32 if dtype == torch.float16 else dtype
    state_BHKV = initial
    if state_BHKV is None:
        state_BHKV = torch.zeros(B, H, K, V, dtype=log_decay_H.dtype, device=q_BTHK.device)

    num_chunks = min(MAX_CHUNKS, MAX_STATE_NUMBERS // max(1, B * H * K * V))
    # the sum over states as a product costs more than it saves for two or three
    segment = CHUNK * (num_chunks if num_chunks >= 4 else 1)
    whole = T - T % CHUNK
    lengths = [min(segment, whole - start) for start in range(0, whole, segment)] + [T - whole] * (whole < T)
    decays = {
        chunk: _decays(log_decay_H, chunk, segment // CHUNK, scale, compute_dtype)
        for chunk in {min(length, CHUNK) for length in lengths}
    }
    # one split for all: the gradient of a slice is a tensor of the whole length
    splits = (x.to(compute_dtype).transpose(1, 2).split(lengths, dim=2) for x in (q_BTHK, k_BTHK, v_BTHV))
    out = []
    for q_BHLK, k_BHLK, v_BHLV in zip(*splits, strict=True):
        chunk = min(q_BHLK.shape[2], CHUNK)
        out_BHLV, state_BHKV = _segment(q_BHLK, k_BHLK, v_BHLV, state_BHKV, decays[chunk], chunk)
        out.append(out_BHLV.transpose(1, 2))
    return torch.cat(out, dim=1).to(dtype), state_BHKV


def _decays(log_decay_H: Tensor, chunk: int, num_chunks: int, scale: float, dtype: torch.dtype) -> Decays:
    token_C = torch.arange(chunk, device=log_decay_H.device, dtype=log_decay_H.dtype)
    chunk_N = torch.arange(num_chunks + 1, device=log_decay_H.device, dtype=log_decay_H.dtype)
    log_decay_H1 = log_decay_H[:, None]

    def past(position_P: Tensor, log_decay_H11: Tensor) -> Tensor:
        # the future is clamped before it is cut: its exponents are positive and would overflow
        return (log_decay_H11 * (position_P[:, None] - position_P).clamp_min(0)).exp().tril()

    return Decays(
        scores_H1CC=(past(token_C, log_decay_H1[..., None]) * scale).to(dtype)[:, None],
        query_H1C1=((log_decay_H1 * (token_C + 1)).exp() * scale).to(dtype)[:, None, :, None],
        key_H1C1=(log_decay_H1 * (chunk - 1 - token_C)).exp().to(dtype)[:, None, :, None],
        states_HNN=past(chunk_N, log_decay_H1[..., None] * chunk),
    )


def _segment(
    q_BHLK: Tensor, k_BHLK: Tensor, v_BHLV: Tensor, state_BHKV: Tensor, decays: Decays, chunk: int
) -> tuple[Tensor, Tensor]:
    """Attend over n chunks at once: what each adds to the state, the states between them, then the outputs."""
    q_BHNCK, k_BHNCK, v_BHNCV = (x.unflatten(2, (-1, chunk)).contiguous() for x in (q_BHLK, k_BHLK, v_BHLV))
    n = q_BHNCK.shape[2]
    added_BHNKV = ((k_BHNCK * decays.key_H1C1).transpose(-1, -2) @ v_BHNCV).to(state_BHKV.dtype)
    if n == 1:
        before_BHNKV = state_BHKV[:, :, None]
        after_BHKV = decays.states_HNN[:, 1, 0, None, None] * state_BHKV + added_BHNKV[:, :, 0]
    else:
        terms_BHNX = torch.cat([state_BHKV[:, :, None], added_BHNKV], dim=2).flatten(3)
        states_BHNKV = (decays.states_HNN[:, : n + 1, : n + 1] @ terms_BHNX).unflatten(3, state_BHKV.shape[2:])
        before_BHNKV, last_BH1KV = states_BHNKV.split([n, 1], dim=2)
        after_BHKV = last_BH1KV[:, :, 0]
    scores_BHNCC = (q_BHNCK @ k_BHNCK.transpose(-1, -2)) * decays.scores_H1CC
    read_BHNCV = (q_BHNCK @ before_BHNKV.to(q_BHNCK.dtype)) * decays.query_H1C1
    return (scores_BHNCC @ v_BHNCV + read_BHNCV).flatten(2, 3), after_BHKV


def _step(
    q_B1HK: Tensor, k_B1HK: Tensor, v_B1HV: Tensor, log_decay_H: Tensor, scale: float, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence once: the decoding step."""
    q_BHK, k_BHK, v_BHV = (x[:, 0].to(log_decay_H.dtype) for x in (q_B1HK, k_B1HK, v_B1HV))
    state_BHKV = k_BHK[..., None] * v_BHV[..., None, :]
    if initial is not None:
        state_BHKV = torch.addcmul(state_BHKV, initial, log_decay_H.exp()[:, None, None])
    out_BHV = ((q_BHK * scale)[..., None, :] @ state_BHKV)[..., 0, :]
    return out_BHV[:, None].to(v_B1HV.dtype), state_BHKV
