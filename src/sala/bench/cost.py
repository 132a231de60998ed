"""What an operator has to do at least: operations of its definition, and bytes that must move once.

A multiplication and an addition are two operations. A backend may do more (a chunk computes what its mask hides) and may
move more (blocks read twice); a share of the machine's ceiling counts only what is here.

The operators' functions take a shape, the tokens of a prompt T or those in the context of a step S, and the bytes b of a
number.
"""

from dataclasses import dataclass

from sala.bench.shapes import AttentionShape
from sala.ops.infllm import num_windows

STATE_BYTES = 4  # states are float32


@dataclass(frozen=True, slots=True)
class Cost:
    """formula: how `flops` and `bytes` come about, in the letters of `sala.ops`."""

    flops: int
    bytes: int
    formula: str


def lightning_prefill(shape: AttentionShape, T: int, b: int) -> Cost:
    H, K = shape.lightning_heads, shape.lightning_width
    return Cost(
        4 * T * H * K * K,
        4 * T * H * K * b + H * K * K * STATE_BYTES,
        "flops 4 T H K V (k v^T into the state, q times the state); bytes q, k, v and output T H K b each, state 4 H K V",
    )


def lightning_training(shape: AttentionShape, T: int, b: int) -> Cost:
    H, K = shape.lightning_heads, shape.lightning_width
    return Cost(
        12 * T * H * K * K,
        11 * T * H * K * b + H * K * K * STATE_BYTES,
        "flops 4 T H K V forward, 8 T H K V backward (a state and a gradient of a state, each made and read twice); bytes "
        "q, k, v and output forward, q, k, v, the output's gradient and three gradients backward, T H K b each; state 4 H K V",
    )


def lightning_step(shape: AttentionShape, S: int, b: int) -> Cost:
    H, K = shape.lightning_heads, shape.lightning_width
    return Cost(
        4 * H * K * K,
        2 * H * K * K * STATE_BYTES + 4 * H * K * b,
        "flops 4 H K V; bytes the state read and written, 8 H K V, and q, k, v and output H K b each",
    )


def compressed_bytes(shape: AttentionShape, S: int, b: int) -> int:
    """Return the bytes of all compressed keys of S tokens, those of both tiers where both are read."""
    geometry = shape.geometry
    windows = num_windows(S, geometry.kernel_size, geometry.kernel_stride)
    if geometry.normalizer == "coarse":
        windows += num_windows(S, geometry.coarse_size, geometry.coarse_stride)
    return windows * shape.groups * shape.width * b


def infllm_selection(shape: AttentionShape, T: int, b: int) -> Cost:
    sparse = max(0, T - shape.geometry.first_sparse_position(T - 1))
    return Cost(
        2 * shape.width * shape.heads * shape.geometry.windows_scored(T),
        sparse * (shape.heads * shape.width * b + shape.groups * shape.geometry.num_selected * 4)
        + compressed_bytes(shape, T, b),
        "flops 2 K H windows (those that each sparse query sees, both tiers); "
        "bytes queries, compressed keys and the table of blocks once",
    )


def infllm_prefill(shape: AttentionShape, T: int, b: int) -> Cost:
    selection = infllm_selection(shape, T, b)
    return Cost(
        selection.flops + 4 * shape.width * shape.heads * shape.geometry.keys_read(T),
        2 * T * (shape.heads + shape.groups) * shape.width * b + compressed_bytes(shape, T, b),
        "flops 2 K H windows + 2 (K + V) H keys (p + 1 of a dense query at p, of a sparse one all of its blocks up to itself); "
        "bytes q, k, v, output and compressed keys once",
    )


def infllm_training(shape: AttentionShape, T: int, b: int) -> Cost:
    forward, keys = infllm_prefill(shape, T, b), shape.geometry.keys_read(T)
    return Cost(
        forward.flops + 10 * shape.width * shape.heads * keys,
        forward.bytes + 4 * T * (shape.heads + shape.groups) * shape.width * b,
        f"forward {forward.formula}; backward flops 2 (3 K + 2 V) H keys (five products, the weights made again), "
        "bytes q, k, v, output, its gradient and three gradients once",
    )


def infllm_step(shape: AttentionShape, S: int, b: int) -> Cost:
    last = S - 1
    sparse = last >= shape.geometry.first_sparse_position(last)
    block = shape.geometry.block_size
    keys = (shape.geometry.num_selected - 1) * block + last % block + 1 if sparse else S
    windows = shape.geometry.windows_scored(S) - shape.geometry.windows_scored(S - 1) if sparse else 0
    return Cost(
        shape.heads * shape.width * (2 * windows + 4 * keys),
        keys * 2 * shape.groups * shape.width * b + (compressed_bytes(shape, S, b) if sparse else 0),
        "flops H K (2 windows + 4 keys); bytes keys and values of the selected blocks, and all compressed keys",
    )


def dense_prefill(shape: AttentionShape, T: int, b: int) -> Cost:
    return Cost(
        4 * shape.width * shape.heads * T * (T + 1) // 2,
        2 * T * (shape.heads + shape.groups) * shape.width * b,
        "flops 2 (K + V) H T (T + 1) / 2; bytes q, k, v and output once",
    )


def dense_step(shape: AttentionShape, S: int, b: int) -> Cost:
    return Cost(
        4 * shape.width * shape.heads * S,
        2 * S * shape.groups * shape.width * b,
        "flops 2 (K + V) H S; bytes all keys and values",
    )
