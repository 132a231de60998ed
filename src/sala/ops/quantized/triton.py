"""The linear map with a quantized weight in Triton, for GPUs: codes become numbers in registers, tile by tile."""

import triton
import triton.language as tl
from torch import Tensor

from sala.ops.pointwise.layout import count, rows
from sala.ops.quantized.weight import STRIP, QuantizedWeight

# a tile of outputs, and columns that are multiplied at once
BLOCK_M, BLOCK_N, BLOCK_K = 16, 64, 64

# fmt: off


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    x, words, scales, offsets, order, bias, out, num_rows, x_row, N, K, group, strip_words, scale_row,
    BITS: tl.constexpr, SIDE: tl.constexpr, M_TILE: tl.constexpr, N_TILE: tl.constexpr, K_TILE: tl.constexpr,
):
    """out = x W^T + bias for a tile of rows and columns."""
    PER_WORD: tl.constexpr = 32 // BITS
    row_M = tl.program_id(0) * M_TILE + tl.arange(0, M_TILE)
    column_N = tl.program_id(1) * N_TILE + tl.arange(0, N_TILE)
    x_M1 = x + row_M.to(tl.int64)[:, None] * x_row
    words_1N = words + ((column_N // SIDE).to(tl.int64) * strip_words + column_N % SIDE)[None, :]
    inside_1N = (column_N < N)[None, :]
    total_MN = tl.zeros((M_TILE, N_TILE), tl.float32)
    for first in range(0, K, K_TILE):
        k_K = first + tl.arange(0, K_TILE)
        inside_K = k_K < K
        inside_KN = inside_K[:, None] & inside_1N
        word_KN = tl.load(words_1N + (k_K // PER_WORD * SIDE)[:, None], mask=inside_KN, other=0)
        code_KN = (word_KN >> (k_K % PER_WORD * BITS)[:, None]) & ((1 << BITS) - 1)
        at_KN = (k_K // group * scale_row)[:, None] + column_N[None, :]
        weight_KN = (code_KN - (1 << (BITS - 1))).to(tl.float32) * tl.load(scales + at_KN, mask=inside_KN, other=0.0)
        if offsets is not None:
            weight_KN += tl.load(offsets + at_KN, mask=inside_KN, other=0.0)
        place_K = k_K if order is None else tl.load(order + k_K, mask=inside_K, other=0)
        x_MK = tl.load(x_M1 + place_K[None, :], mask=(row_M < num_rows)[:, None] & inside_K[None, :], other=0.0)
        total_MN += tl.dot(x_MK, weight_KN.to(x_MK.dtype), input_precision="ieee")
    if bias is not None:
        total_MN += tl.load(bias + column_N, mask=column_N < N, other=0.0).to(tl.float32)[None, :]
    inside_MN = (row_M < num_rows)[:, None] & inside_1N
    tl.store(out + row_M.to(tl.int64)[:, None] * N + column_N[None, :], total_MN.to(out.dtype.element_ty), mask=inside_MN)


# fmt: on


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias_N: Tensor | None) -> Tensor:
    """See `sala.ops.quantized`. x is not rounded."""
    out = x.new_empty((*x.shape[:-1], weight.N))
    (x, row), w = rows(x), weight
    if not out.numel():
        return out
    grid = (triton.cdiv(count(x), BLOCK_M), triton.cdiv(w.N, BLOCK_N))
    steps = w.words.shape[1]
    _multiply[grid](
        x, w.words, w.scales, w.offsets, w.order, None if bias_N is None else bias_N.contiguous(), out,
        count(x), row, w.N, w.K, w.group, steps * STRIP, w.scales.shape[1],
        BITS=w.bits, SIDE=STRIP, M_TILE=BLOCK_M, N_TILE=BLOCK_N, K_TILE=BLOCK_K,
    )  # fmt: skip
    return out
