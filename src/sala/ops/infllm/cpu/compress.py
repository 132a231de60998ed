"""Compressed keys in C++: each window's mean in one pass over its keys."""

import ctypes

import torch
from torch import Tensor

from sala.ops import native
from sala.ops.infllm.geometry import num_windows

_compress = {
    torch.float32: native.Function("sala_compress_f32", "ppp i"),
    torch.bfloat16: native.Function("sala_compress_bf16", "ppp i"),
}


def compress(k_BSGK: Tensor, size: int, stride: int) -> Tensor:
    """Return (B, N, G, K) means of the complete windows; see `sala.ops.infllm.compress`."""
    return _operator(k_BSGK, size, stride)


def _means(k_BSGK: Tensor, size: int, stride: int) -> Tensor:
    B, S, G, K = k_BSGK.shape
    return k_BSGK.new_empty(B, num_windows(S, size, stride), G, K)


@native.operator("infllm_compress(Tensor k, int size, int stride) -> Tensor", _means)
def _operator(k_BSGK: Tensor, size: int, stride: int) -> Tensor:
    k_BSGK = k_BSGK if k_BSGK.stride(-1) == 1 else k_BSGK.contiguous()
    means_BNGK = _means(k_BSGK, size, stride)
    sizes = (*means_BNGK.shape, size, stride, *k_BSGK.stride()[:3])
    numbers = (ctypes.c_int64 * len(sizes))(*sizes)
    _compress[k_BSGK.dtype](
        ctypes.addressof(numbers), k_BSGK.data_ptr(), means_BNGK.data_ptr(), torch.get_num_threads()
    )
    return means_BNGK
