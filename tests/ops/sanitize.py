"""Every native operator at random shapes, strides and lengths: run under the sanitizers by scripts/sanitize.sh.

What comes out is compared with plain torch once a shape; the point is that no byte beside a tensor is touched: tensors
end where their memory does, as the sanitizer sees it.
"""

import random
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from sala.ops import native, pointwise
from sala.ops.dense import dense_attention
from sala.ops.infllm import SparseGeometry, compress, infllm_attention, select_blocks
from sala.ops.lightning import lightning_attention, log_decay
from sala.ops.linear import linear
from sala.ops.native.operator import FEW_ROWS
from tolerances import TOLERANCES

DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = (1, 7, 8, 16, 24, 32, 40, 64, 80, 96, 128)
GROUPS = (1, 2, 3, 4, 8, 16, 17)


def fresh(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return random numbers, with the token and head dimensions swapped in memory half of the time."""
    if len(shape) == 4 and random.random() < 0.5:
        return torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)
    return torch.randn(shape).to(dtype)


def lightning(dtype: torch.dtype) -> None:
    B, T, H, K, V = random.randint(1, 2), random.choice((1, 2, 63, 64, 65, 150)), random.randint(1, 9), width(), width()
    q, k, v = fresh(B, T, H, K, dtype=dtype), fresh(B, T, H, K, dtype=dtype), fresh(B, T, H, V, dtype=dtype)
    options: dict = {"scale": K**-0.5, "initial_state_BHKV": random.choice((None, torch.randn(B, H, K, V)))}
    if random.random() < 0.3:
        options["mask_BT"] = torch.rand(B, T) < 0.7
    both(lambda backend: lightning_attention(q, k, v, log_decay(H), backend=backend, **options)[0], dtype)


def packed_lightning(dtype: torch.dtype) -> None:
    H, K, V = random.randint(1, 5), width(), width()
    ends = torch.tensor([0, 1, 1, 70, 70 + random.randint(1, 80)])
    T = int(ends[-1])
    q, k, v = fresh(1, T, H, K, dtype=dtype), fresh(1, T, H, K, dtype=dtype), fresh(1, T, H, V, dtype=dtype)
    both(
        lambda backend: lightning_attention(q, k, v, log_decay(H), scale=K**-0.5, cu_seqlens=ends, backend=backend)[0],
        dtype,
    )


def dense(dtype: torch.dtype) -> None:
    B, T, group, G, K, V = (
        random.randint(1, 2),
        random.choice((1, 2, 17, 80)),
        random.choice(GROUPS),
        2,
        width(),
        width(),
    )
    start = random.choice((0, 5, 300))
    q = fresh(B, T, G * group, K, dtype=dtype)
    k, v = fresh(B, start + T, G, K, dtype=dtype), fresh(B, start + T, G, V, dtype=dtype)
    both(lambda backend: dense_attention(q, k, v, None, scale=K**-0.5, start=start, backend=backend), dtype)


def sparse(dtype: torch.dtype) -> None:
    geometry = SparseGeometry(
        kernel_size=random.choice((4, 8)),
        kernel_stride=random.choice((2, 4)),
        block_size=random.choice((16, 32, 64)),
        window_size=random.choice((0, 64)),
        topk=random.choice((2, 4)),
        dense_len=random.choice((0, 100)),
        normalizer=random.choice(("coarse", "exact")),
    )
    T, group, G, K, V = random.choice((1, 3, 70)), random.choice(GROUPS), 2, width(), width()
    start = random.choice((0, 130, 700))
    q = fresh(1, T, G * group, K, dtype=dtype)
    k, v = fresh(1, start + T, G, K, dtype=dtype), fresh(1, start + T, G, V, dtype=dtype)
    tiers = (
        compress(k, geometry.kernel_size, geometry.kernel_stride),
        compress(k, geometry.coarse_size, geometry.coarse_stride),
    )
    positions = torch.arange(start, start + T)[None]
    for backend in ("cpu", "eager"):  # which of nearly equal blocks wins is rounding: the laws compare those
        select_blocks(q, *tiers, positions, geometry, scale=K**-0.5, backend=backend)
    out = infllm_attention(q, k, v, *tiers, positions, geometry, scale=K**-0.5, backend="cpu")
    assert out.isfinite().all()


def elementwise(dtype: torch.dtype) -> None:
    B, T, H, K = random.randint(1, 2), random.choice((1, 5, 33)), random.randint(1, 5), 2 * random.randint(1, 70)
    x, gate = fresh(B, T, H, K, dtype=dtype), fresh(B, T, H * K, dtype=dtype)
    weight, wide = fresh(K, dtype=dtype), fresh(H * K, dtype=dtype)
    tables = torch.randn(B, T, K // 2), torch.randn(B, T, K // 2)
    other = fresh(B, T, H * K, dtype=dtype)
    both(lambda backend: pointwise.rms_norm(other, wide, 1e-6, backend=backend), dtype)
    both(lambda backend: pointwise.add_rms_norm(other, gate, 0.3, wide, 1e-6, backend=backend)[1], dtype)
    both(lambda backend: pointwise.norm_rotate(x, norm=(weight, 1e-6), rotation=tables, backend=backend), dtype)
    both(lambda backend: pointwise.norm_gate(x, norm=(wide, 1e-6), gate_BTD=gate, backend=backend), dtype)
    both(lambda backend: pointwise.silu_mul(gate, other, backend=backend), dtype)


def few_rows(dtype: torch.dtype) -> None:
    M, N, K = random.randint(1, FEW_ROWS), random.choice((1, 7, 64, 300)), random.choice((1, 31, 32, 65, 576))
    x, weight, bias = fresh(M, K, dtype=dtype), fresh(N, K, dtype=dtype), random.choice((None, fresh(N, dtype=dtype)))
    both(lambda backend: linear(x, weight, bias, backend=backend), dtype)


CASES: tuple[Callable[[torch.dtype], None], ...] = (lightning, packed_lightning, dense, sparse, elementwise, few_rows)


def width() -> int:
    return random.choice(WIDTHS)


def both(run: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    actual, expected = run("cpu").float(), run("eager").float()
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=2 * TOLERANCES[dtype] * max(largest, 1e-6))


def levels() -> list[str]:
    """Return the best level here, the one without any instructions of its own, and the tiles: every line is in one."""
    here = native.levels_here()
    return list(dict.fromkeys([here[0], *(name for name in ("portable", "amx-emulated") if name in here)]))


def main(rounds: int) -> None:
    with torch.no_grad():
        for level in levels():
            with native.at_level(level):
                for seed in range(rounds):
                    for case in CASES:
                        random.seed(seed)
                        torch.manual_seed(seed)
                        for dtype in DTYPES:
                            print(f"{level} {case.__name__} {dtype} {seed}", end="\r", flush=True)
                            case(dtype)
            print(f"{level}: {rounds} rounds of {len(CASES)} operators in {len(DTYPES)} dtypes, clean", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
