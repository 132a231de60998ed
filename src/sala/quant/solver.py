"""One matrix in 4 or 8 bits a number: by rounding, or by GPTQ, which makes up for each column's error in the columns after it.

GPTQ: Frantar et al. 2022, arXiv 2210.17323, algorithm 1, with `act_order` as in its authors' code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sala.errors import CheckpointError

# columns whose errors are carried on together
BLOCK = 128
# how much of a group's range is tried as its scale's; where the smallest squared error is, it stays
SHRINKS = [1 - step / 40 for step in range(17)]
MOST_DAMPING = 1.0


@dataclass(frozen=True, slots=True)
class Solved:
    """codes int32 (N, K) from 0 to 2^bits - 1; scales float16 and zeros int32 (G, N); g_idx int32 (K,): each column's group.

    error: sum of squares of what the outputs change by, over those of the outputs.
    """

    codes_NK: Tensor
    scales_GN: Tensor
    zeros_GN: Tensor
    g_idx_K: Tensor
    error: float


def grid(weight_NC: Tensor, bits: int, sym: bool, search: bool) -> tuple[Tensor, Tensor]:
    """Return scale (float16 numbers in float32) and zero point of each row, (N, 1): the range of its numbers.

    A zero point is at least 1: the format stores one less, and not every reader takes it for a number below zero.
    search: try smaller ranges too, and take the one with the smallest squared error.
    """
    top = 2**bits - 1
    low, high = weight_NC.amin(1, keepdim=True).clamp(max=0), weight_NC.amax(1, keepdim=True).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in SHRINKS if search else (1.0,):
        # a row of zeros, and one below what float16 holds, gets the smallest scale there is
        scale = ((high - low) * shrink / top).half().float().clamp(min=2.0**-24)
        zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else (-low * shrink / scale).round().clamp(1, top)
        numbers = scale * ((weight_NC / scale + zero).round().clamp(0, top) - zero)
        error = (numbers - weight_NC).square().sum(1, keepdim=True)
        better = error < best_error
        best_error = error.where(better, best_error)
        best_scale, best_zero = scale.where(better, best_scale), zero.where(better, best_zero)
    return best_scale, best_zero


def rtn(weight_NK: Tensor, hessian_KK: Tensor, bits: int, group: int, sym: bool) -> Solved:
    """Round every number to the nearest code of its group."""
    rows_KN, N = weight_NK.float().T, weight_NK.shape[0]
    parts = [_round(part_CN.T, *grid(part_CN.T, bits, sym, search=False), bits) for part_CN in rows_KN.split(group)]
    codes, scales, zeros, numbers = zip(*parts, strict=True)
    g_idx = torch.arange(len(rows_KN), dtype=torch.int32) // group
    return _solved(weight_NK, hessian_KK, torch.cat(codes, 1), scales, zeros, g_idx, torch.cat(numbers, 1).view(N, -1))


def gptq(
    weight_NK: Tensor, hessian_KK: Tensor, bits: int, group: int, sym: bool, act_order: bool, damping: float
) -> Solved:
    """Round column by column; what a column's rounding changes in the outputs, the columns after it take back.

    hessian_KK: float32, sum of x x^T over calibration tokens. group: divides `BLOCK`, or K.
    act_order: columns with the largest inputs first. damping: share of the mean diagonal that is added to it; ten times as
        much where the matrix cannot be inverted.

    Raises:
        CheckpointError: the inputs are not finite.
    """
    N, K = weight_NK.shape
    diagonal = hessian_KK.diagonal()
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(K)
    inverse_KK = _inverse(hessian_KK[order][:, order], damping)
    # columns are read one after the other: they stand as rows
    rows_KN = weight_NK.float().T[order].contiguous()
    codes_KN, numbers_KN = torch.empty(K, N, dtype=torch.int32), torch.empty(K, N)
    scales, zeros = [], []
    for first in range(0, K, BLOCK):
        end = min(first + BLOCK, K)
        errors_CN = torch.empty(end - first, N)
        for k in range(first, end):
            if k % group == 0:
                # a group ends with its block, or is the whole row: no column of it has an error yet to hear of
                scale, zero = grid(rows_KN[k : k + group].T, bits, sym, search=True)
                scales.append(scale)
                zeros.append(zero)
            code, number = _nearest(rows_KN[k], scales[-1][:, 0], zeros[-1][:, 0], bits)
            codes_KN[k], numbers_KN[k] = code, number
            error = (rows_KN[k] - number) / inverse_KK[k, k]
            rows_KN[k:end] -= torch.outer(inverse_KK[k, k:end], error)
            errors_CN[k - first] = error
        rows_KN[end:] -= inverse_KK[first:end, end:].T @ errors_CN
    back = torch.empty_like(order)
    back[order] = torch.arange(K)
    g_idx = (torch.arange(K, dtype=torch.int32) // group)[back]
    return _solved(weight_NK, hessian_KK, codes_KN[back].T, scales, zeros, g_idx, numbers_KN[back].T)


def _inverse(hessian_KK: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse, which has each column's share of the columns after it."""
    if not hessian_KK.isfinite().all():
        raise CheckpointError("a layer's inputs are not finite; expected a model that computes numbers on this text")
    # a column that is always zero decides nothing
    hessian_KK = hessian_KK.clone()
    diagonal = hessian_KK.diagonal()
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean().item()
    while True:
        damped = hessian_KK + damping * mean * torch.eye(len(hessian_KK))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
        if damping > MOST_DAMPING:
            raise CheckpointError(
                f"a layer's inputs cannot be told apart with damping up to {MOST_DAMPING}; expected more text"
            )


def _nearest(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    code = (values / scale + zero).round().clamp(0, 2**bits - 1)
    return code.int(), scale * (code - zero)


def _round(weight_NC: Tensor, scale_N1: Tensor, zero_N1: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    code, number = _nearest(weight_NC, scale_N1, zero_N1, bits)
    return code, scale_N1, zero_N1, number


def _solved(
    weight_NK: Tensor,
    hessian_KK: Tensor,
    codes_NK: Tensor,
    scales: object,
    zeros: object,
    g_idx: Tensor,
    numbers_NK: Tensor,
) -> Solved:
    lost_NK = numbers_NK - weight_NK.float()
    error = (lost_NK @ hessian_KK * lost_NK).sum() / (weight_NK.float() @ hessian_KK * weight_NK.float()).sum()
    scales_GN, zeros_GN = (torch.cat(list(parts), 1).T for parts in (scales, zeros))  # type: ignore[call-overload]
    return Solved(codes_NK, scales_GN.half(), zeros_GN.int(), g_idx, error.item())
