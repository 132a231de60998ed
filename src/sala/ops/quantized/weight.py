"""Matrices of 4 or 8 bits a number: how they are laid out, made from codes, and turned back into numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sala.errors import InputError

BITS = (4, 8)
# columns that stand side by side
STRIP = 16


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A matrix (N, K): w = scale (code - 2^(bits - 1)) + offset, scale and offset by row and group of K.

    words: int32 (N / 16, steps, 16), N rounded up: a word has a row's codes of 8 steps of K at 4 bits, or of 4 at 8 bits,
        the first in its lowest bits. That is GPTQ's `qweight` with 16 rows side by side.
    scales: float16 (G, N rounded up to 16). offsets: float32 of the same shape, or None for zero.
    order: int32 (K,) or None: the column of the matrix that each code of a row belongs to.
    group: columns that share a scale, in that order; K or more: all.
    """

    words: Tensor
    scales: Tensor
    offsets: Tensor | None
    order: Tensor | None
    bits: int
    group: int
    N: int
    K: int

    def __post_init__(self) -> None:
        check_group(self.bits, self.group, self.K)

    @property
    def size_bytes(self) -> int:
        parts = (self.words, self.scales, self.offsets, self.order)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def check_group(bits: int, group: int, K: int) -> None:
    """Raise InputError for numbers of bits or sizes of groups that no kernel has."""
    if bits not in BITS:
        raise InputError(f"bits = {bits}; expected 4 or 8")
    if group < K and (group < 8 or group % (8 if group <= 128 else 128)):
        raise InputError(f"group = {group}; expected a multiple of 8 up to 128, of 128 above, or a whole row")


def pack_codes(
    codes_NK: Tensor, scales_GN: Tensor, offsets_GN: Tensor | None, bits: int, group: int, order_K: Tensor | None = None
) -> QuantizedWeight:
    """Return a matrix made of codes (N, K) from 0 to 2^bits - 1, which stand in `order_K`."""
    N, K = codes_NK.shape
    return pack_words(words_of(codes_NK, bits), N, K, scales_GN, offsets_GN, bits, group, order_K)


def words_of(codes_NK: Tensor, bits: int) -> Tensor:
    """Return codes (N, K) as GPTQ's `qweight`: int32 (K bits / 32, N), K rounded up."""
    if bits not in BITS:
        raise InputError(f"bits = {bits}; expected 4 or 8")
    a_word = 32 // bits
    codes_KN = torch.nn.functional.pad(codes_NK.T.long(), (0, 0, 0, -codes_NK.shape[1] % a_word))
    shifts = bits * torch.arange(a_word, device=codes_NK.device)
    words = (codes_KN.unflatten(0, (-1, a_word)) << shifts[:, None]).sum(dim=1)
    return (words & 0xFFFFFFFF).where(words < 2**31, words - 2**32).int()


def pack_words(
    qweight_WN: Tensor,
    N: int,
    K: int,
    scales_GN: Tensor,
    offsets_GN: Tensor | None,
    bits: int,
    group: int,
    order_K: Tensor | None = None,
) -> QuantizedWeight:
    """Return a matrix made of GPTQ's `qweight`, int32 (K bits / 32, N)."""
    columns, steps = -N % STRIP, -qweight_WN.shape[0] % (bits // 4)
    words = torch.nn.functional.pad(qweight_WN, (0, columns, 0, steps)).unflatten(1, (-1, STRIP))
    scales, offsets = (
        None if part is None else torch.nn.functional.pad(part.to(dtype), (0, columns)).contiguous()
        for part, dtype in ((scales_GN, torch.float16), (offsets_GN, torch.float32))
    )
    assert scales is not None
    order = None if order_K is None else order_K.int().contiguous()
    return QuantizedWeight(words.transpose(0, 1).contiguous(), scales, offsets, order, bits, group, N, K)


def unpack_words(weight: QuantizedWeight) -> Tensor:
    """Return GPTQ's `qweight`, int32 (K bits / 32, N)."""
    return weight.words.transpose(0, 1).flatten(1)[: -(-weight.K * weight.bits // 32), : weight.N].contiguous()


def dequantize(weight: QuantizedWeight, dtype: torch.dtype, first: int = 0, end: int | None = None) -> Tensor:
    """Return rows `first` to `end` of the matrix, (rows, K); `first` is a multiple of 16."""
    end = weight.N if end is None else min(end, weight.N)
    strips = slice(first // STRIP, -(-end // STRIP))
    shifts = weight.bits * torch.arange(32 // weight.bits, dtype=torch.int32, device=weight.words.device)
    codes = (weight.words[strips, :, :, None] >> shifts) & (2**weight.bits - 1)
    codes_NK = codes.transpose(1, 2).flatten(2).flatten(0, 1)[: end - first, : weight.K]
    group_K = torch.arange(weight.K, device=weight.words.device) // weight.group
    rows = weight.scales.T[first:end].to(dtype)[:, group_K] * (codes_NK - 2 ** (weight.bits - 1)).to(dtype)
    if weight.offsets is not None:
        rows = rows + weight.offsets.T[first:end].to(dtype)[:, group_K]
    return rows if weight.order is None else torch.empty_like(rows).index_copy_(1, weight.order.long(), rows)
