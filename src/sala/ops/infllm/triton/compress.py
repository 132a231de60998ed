"""Compressed keys in Triton: the means of windows, summed in float32."""

import triton
import triton.language as tl
from torch import Tensor

from sala.ops import gpu
from sala.ops.infllm.geometry import num_windows

# windows a program
WINDOWS = 16


def compress(k_BSGK: Tensor, size: int, stride: int) -> Tensor:
    """Return (B, N, G, K) means of the complete windows; see `sala.ops.infllm.compress`."""
    return _operator(k_BSGK, size, stride)


def _means(k_BSGK: Tensor, size: int, stride: int) -> Tensor:
    B, S, G, K = k_BSGK.shape
    return k_BSGK.new_empty(B, num_windows(S, size, stride), G, K)


@gpu.operator("infllm_triton_compress(Tensor k, int size, int stride) -> Tensor", _means)
def _operator(k_BSGK: Tensor, size: int, stride: int) -> Tensor:
    means_BNGK = _means(k_BSGK, size, stride)
    B, N, G, K = means_BNGK.shape
    if means_BNGK.numel():
        grid = (triton.cdiv(N, WINDOWS), B * G)
        width = triton.next_power_of_2(K)
        _compress[grid](gpu.strided(k_BSGK), means_BNGK, N, G, K, size, stride, WINDOWS, width)
    return means_BNGK


@triton.jit(do_not_specialize=["N"])
def _compress(
    k,
    means,
    N,
    G,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    stride,
    WINDOWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    b = (tl.program_id(1) // G).to(tl.int64)
    g = (tl.program_id(1) % G).to(tl.int64)
    window_N = tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS)
    column_K = tl.arange(0, WIDTH)
    inside_NK = (window_N < N)[:, None] & (column_K < K)[None, :]
    first_N = (window_N * stride).to(tl.int64)
    at_NK = k.at + b * k.row + g * k.head + first_N[:, None] * k.place + column_K[None, :]
    sum_NK = tl.full([WINDOWS, WIDTH], 0.0, tl.float32)
    for token in range(SIZE):
        sum_NK += tl.load(at_NK + token * k.place, mask=inside_NK, other=0.0).to(tl.float32)
    to_NK = means + ((b * N + window_N.to(tl.int64)) * G + g)[:, None] * K + column_K[None, :]
    # rounded once, as a division is elsewhere
    mean_NK = tl.div_rn(sum_NK, tl.full([WINDOWS, WIDTH], SIZE, tl.float32))
    tl.store(to_NK, mean_NK, mask=inside_NK)
