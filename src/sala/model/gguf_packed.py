"""Matrices of GGUF files that run as they are stored: blocks of 32 numbers with a scale each (llama.cpp's ggml-common.h)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sala.errors import CheckpointError
from sala.ops.quantized import QuantizedWeight, pack_codes

BLOCK = 32
Bytes = NDArray[np.uint8]


def _nibbles(bytes_NBC: Bytes) -> Bytes:
    # the first 16 numbers of a block are the low halves
    return np.concatenate([bytes_NBC & 15, bytes_NBC >> 4], axis=-1)


def _q4_0(blocks_NBC: Bytes) -> tuple[Bytes, Tensor, None]:
    return _nibbles(blocks_NBC[..., 2:]), _halves(blocks_NBC, 0), None


def _q4_1(blocks_NBC: Bytes) -> tuple[Bytes, Tensor, Tensor]:
    scales, lowest = _halves(blocks_NBC, 0), _halves(blocks_NBC, 2)
    # numbers are counted from code 8 here
    return _nibbles(blocks_NBC[..., 4:]), scales, lowest.float() + 8 * scales.float()


def _q8_0(blocks_NBC: Bytes) -> tuple[Bytes, Tensor, None]:
    return blocks_NBC[..., 2:] ^ np.uint8(128), _halves(blocks_NBC, 0), None


def _halves(blocks_NBC: Bytes, first: int) -> Tensor:
    """Return the float16 at a place of every block, (blocks, N)."""
    return torch.from_numpy(np.ascontiguousarray(blocks_NBC[..., first : first + 2]).view(np.float16)[..., 0].T.copy())


# type -> (bits, bytes of a block, its reader)
KINDS: dict[str, tuple[int, int, Callable[[Bytes], tuple[Bytes, Tensor, Tensor | None]]]] = {
    "Q4_0": (4, 18, _q4_0),
    "Q4_1": (4, 20, _q4_1),
    "Q8_0": (8, 34, _q8_0),
}


def packed_weight(tensor: Any, restore: Callable[[Bytes], Bytes]) -> QuantizedWeight:
    """Return a tensor of one of `KINDS` as it is stored; `restore` puts its rows into the order of transformers.

    Raises:
        CheckpointError: a scale is not finite.
    """
    bits, size, read = KINDS[tensor.tensor_type.name]
    K, N = (int(width) for width in tensor.shape)
    rows = restore(np.asarray(tensor.data, np.uint8).reshape(N, -1))
    codes_NBC, scales, offsets = read(rows.reshape(N, K // BLOCK, size))
    if not (scales.isfinite().all() and (offsets is None or offsets.isfinite().all())):
        raise CheckpointError(f"tensor {tensor.name!r} has scales that are not finite; expected numbers")
    return pack_codes(torch.from_numpy(codes_NBC.reshape(N, K).copy()), scales, offsets, bits, BLOCK)
