"""Laws of the block-sparse kernels for GPUs, at sizes that Triton's interpreter gets through."""

import random
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from devices import GPU, memory_for
from sala.errors import BackendError, InputError
from sala.ops import gpu
from sala.ops.infllm import SparseGeometry, compress, infllm_attention, num_windows, reference, select_blocks
from tolerances import assert_close

if (why_not := gpu.unavailable()) is not None:
    pytest.skip(why_not, allow_module_level=True)
if GPU:
    pytestmark = pytest.mark.gpu

DEVICE = "cuda" if GPU else "cpu"
K, V = 8, 6
SCALE = K**-0.5
# six blocks of 16 tokens are read, two of them freely chosen
SMALL = SparseGeometry(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4, dense_len=0)

kernels = import_module("sala.ops.infllm.triton")
# by these names, for the package has functions of the others
attend_module, select_module, backward_module = (
    import_module(f"sala.ops.infllm.triton.{name}") for name in ("attend", "select", "backward")
)


def qkv(T: int, S: int, G: int = 2, group: int = 2, B: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (B, T, G * group, K), (B, S, G, K), (B, S, G, V)
    q, k, v = (torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes)
    return [2 * q, k, v]


def run(start: int, T: int, B: int = 1) -> Tensor:
    return torch.arange(start, start + T, device=DEVICE).expand(B, T)


def tiers(k: Tensor, geometry: SparseGeometry, backend: Callable[..., Tensor] = compress) -> tuple[Tensor, Tensor]:
    return (
        backend(k, geometry.kernel_size, geometry.kernel_stride),
        backend(k, geometry.coarse_size, geometry.coarse_stride),
    )


def select(q: Tensor, k: Tensor, positions: Tensor, geometry: SparseGeometry, backend: str = "triton") -> Tensor:
    return select_blocks(q, *tiers(k, geometry), positions, geometry, scale=SCALE, backend=backend)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    geometry: SparseGeometry,
    backend: str = "triton",
    **options,
) -> Tensor:
    return infllm_attention(q, k, v, *tiers(k, geometry), positions, geometry, scale=SCALE, backend=backend, **options)


def gradients(out: Tensor, inputs: list[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)


@pytest.mark.parametrize(("size", "stride"), [(32, 16), (8, 8), (5, 3), (1, 1), (131, 2)])
def test_compressed_keys_are_means_of_complete_windows(size: int, stride: int) -> None:
    k = torch.randn(2, 3, 130, K, device=DEVICE).transpose(1, 2)
    means = [k[:, first : first + size].mean(1) for first in range(0, 130 - size + 1, stride)]
    actual = kernels.compress(k, size, stride)
    assert actual.shape[1] == len(means) == num_windows(130, size, stride)
    if means:
        assert_close(actual, torch.stack(means, 1))
        assert torch.equal(kernels.compress(k[:, 3 * stride :], size, stride), actual[:, 3:])


@pytest.mark.parametrize(
    ("block", "size", "stride", "G", "group", "init", "window", "topk", "normalizer"),
    [
        (16, 8, 4, 1, 16, 1, 1, 3, "coarse"),
        (16, 4, 4, 2, 1, 0, 0, 2, "exact"),
        (16, 32, 8, 2, 3, 2, 1, 3, "coarse"),
        (32, 8, 4, 1, 5, 1, 1, 3, "exact"),
        (48, 5, 3, 1, 20, 0, 0, 2, "coarse"),
        (64, 32, 16, 1, 32, 1, 1, 3, "coarse"),
        (320, 64, 64, 1, 2, 0, 0, 2, "coarse"),
    ],
)
def test_the_kernels_are_the_definition(
    block: int, size: int, stride: int, G: int, group: int, init: int, window: int, topk: int, normalizer: str
) -> None:
    geometry = SparseGeometry(size, stride, init, block, window * block, topk, 0, normalizer)
    S = 7 * block + 5
    q, k, v = qkv(18, S, G, group)
    places = [-1, 0, size - 1, block, 2 * block + 3, 4 * block - 1, 5 * block, S - 2, S - 1]
    positions = torch.tensor([places + places[::-1]], device=DEVICE)
    assert torch.equal(select(q, k, positions, geometry), select(q, k, positions, geometry, "reference"))
    expected = attend(q, k, v, positions, geometry, "reference")
    assert_close(attend(q, k, v, positions, geometry), expected)
    assert_close(attend(q[:, 7:8], k, v, positions[:, 7:8], geometry), expected[:, 7:8])


@pytest.mark.parametrize("block", [16, 40, 64])
def test_a_block_is_read_in_parts_that_fit(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TILE_BYTES", 2**13)
    assert select_module.tile_keys(select_module.padded(block), torch.float32, K, V) == 16
    geometry = replace(SMALL, block_size=block, window_size=block)
    inputs = [x.requires_grad_() for x in qkv(5, 7 * block + 3)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    positions = torch.tensor([[7 * block + 2, -1, 6 * block, 5 * block + 17, 3]], device=DEVICE)
    weight = torch.randn(1, 5, 4, V, device=DEVICE)
    actual, expected = attend(*inputs, positions, geometry), attend(*wide, positions, geometry, "reference")
    assert_close(actual, expected.float())
    for a, b in zip(gradients(actual, inputs, weight), gradients(expected, wide, weight), strict=True):
        assert_close(a, b.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 64, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("group", [1, 5, 16])
def test_tiles_are_powers_of_two_that_fit_whatever_the_width(dtype: torch.dtype, width: int, group: int) -> None:
    tokens, heads = select_module.list_tile(512, group, dtype, width, 64)
    keys = select_module.tile_keys(1024, dtype, width, 64)
    for rows in (tokens * heads, keys):
        assert rows & (rows - 1) == 0 and rows >= 16
        assert rows <= 64 and rows * select_module.padded(width) * dtype.itemsize <= gpu.TILE_BYTES


def laid_out(x: Tensor, generator: random.Random) -> Tensor:
    """Return the same numbers with dimensions in any order in memory, and gaps between them."""
    order = generator.sample(range(4), 4)
    wide = torch.full([x.shape[i] + generator.randrange(2) for i in order], torch.nan, dtype=x.dtype, device=DEVICE)
    view = wide.permute([order.index(i) for i in range(4)])[tuple(slice(size) for size in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize("seed", range(8))
def test_any_call_is_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    block, stride = draw.choice([(16, 4), (16, 16), (24, 8), (32, 8), (64, 16), (48, 3)])
    size = stride * draw.choice([1, 2, 3]) + draw.randrange(2)
    init, window = draw.randrange(3), block * draw.randrange(2)
    geometry = SparseGeometry(
        *(size, stride, init, block, window, init + 1 + draw.randrange(2)),
        dense_len=draw.choice([0, 3 * block]),
        normalizer=draw.choice(["coarse", "exact"]),
        dense_rule=draw.choice(["position", "sequence"]),
    )
    B, T, G, group = draw.randint(1, 2), draw.choice([1, 2, 5]), draw.randint(1, 2), draw.choice([1, 3, 7, 16, 31, 32])
    S = draw.choice([1, size - 1, block - 1, block, 3 * block + 1, 5 * block + 7, 6 * block]) or 1
    width, value_width = (draw.choice([1, 24, 64, 128]) for _ in range(2))
    dtype = draw.choice([torch.float32, torch.float16])
    shapes = (B, T, G * group, width), (B, S, G, width), (B, S, G, value_width)
    q, k, v = (laid_out(torch.randn(shape, dtype=dtype), draw) for shape in shapes)
    positions = torch.tensor([[draw.choice([-1, S - 1, draw.randrange(S)]) for _ in range(T)] for _ in range(B)])
    compressed = [laid_out(x, draw) for x in tiers(k, geometry)]
    arguments = (q, k, v, *compressed, positions.to(DEVICE), geometry, width**-0.5, None)
    assert_close(kernels.attend(*arguments), reference.attend(*arguments))


@pytest.mark.skipif(GPU, reason="memory that is not there")
def test_tokens_may_lie_further_apart_than_32_bits_reach() -> None:
    apart, S = 2**28, 12
    k = torch.randn(1, S, 1, K).half()
    # so that an offset that wraps round stays inside
    far = memory_for(2 * (S + 9) * apart).as_strided(k.shape, (0, apart, 0, 1), 8 * apart).copy_(k)
    assert torch.equal(kernels.compress(far, S, S), kernels.compress(k, S, S))


@pytest.mark.skipif(GPU, reason="memory that is not there")
def test_heads_may_lie_further_apart_than_32_bits_reach() -> None:
    apart, H = 2**30, 4
    far = memory_for(2 * (H + 2) * apart)
    q, k, v = (x.half() for x in qkv(1, 120, G=H, group=1))
    tensors = q, k, v, *tiers(k, SMALL)
    spread = []
    for i, x in enumerate(tensors):
        strides = (x.shape[1] * x.shape[3], x.shape[3], apart, 1)
        # so that an offset that wraps round stays inside
        spread.append(far.as_strided(x.shape, strides, apart + i * apart // 8).copy_(x))
    positions, options = run(119, 1), {"scale": SCALE, "backend": "triton"}
    expected = infllm_attention(*tensors, positions, SMALL, **options)
    assert torch.equal(infllm_attention(*spread, positions, SMALL, **options), expected)
    assert torch.equal(kernels.compress(spread[1], 8, 4), tensors[3])


# below position 109 all blocks are read, one more than are chosen
@pytest.mark.parametrize(("normalizer", "G", "group", "dense_len"), [("coarse", 2, 2, 0), ("exact", 1, 5, 110)])
def test_gradients_are_those_of_the_definition(normalizer: str, G: int, group: int, dense_len: int) -> None:
    geometry = replace(SMALL, normalizer=normalizer, dense_len=dense_len)
    inputs = [x.requires_grad_() for x in qkv(21, 150, G, group)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    positions = run(130, 21).clone() - 1
    positions[0, 3], positions[0, 10], positions[0, 14], positions[0, 15] = -1, 60, 108, 103
    weight = torch.randn(1, 21, G * group, V, device=DEVICE)
    actual, expected = attend(*inputs, positions, geometry), attend(*wide, positions, geometry, "reference")
    assert_close(actual, expected.float())
    pairs = zip(gradients(actual, inputs, weight), gradients(expected, wide, weight), strict=True)
    for a, b in pairs:
        assert_close(a, b.float())


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(3, 150))
    (first, *_) = torch.autograd.grad(attend(q, k, v, run(147, 3), SMALL).square().sum(), (q, k, v), create_graph=True)
    with pytest.raises(BackendError, match="not differentiated twice"):
        first.sum().backward()


def test_few_queries_of_several_rows_have_the_gradients_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    # a list is read in pieces of a block a token, which are joined one by one
    monkeypatch.setattr(attend_module, "FEW_ENTRIES", 1)
    monkeypatch.setattr(attend_module, "COMBINED_PIECES", 1)
    monkeypatch.setattr(backward_module, "QUERIES", 2)
    inputs = [x.requires_grad_() for x in qkv(3, 150, G=1, B=2)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    positions = torch.tensor([[147, 148, 149], [-1, 110, 120]], device=DEVICE)
    weight = torch.randn(2, 3, 2, V, device=DEVICE)
    actual, expected = attend(*inputs, positions, SMALL), attend(*wide, positions, SMALL, "reference")
    assert_close(actual, expected.float())
    for a, b in zip(gradients(actual, inputs, weight), gradients(expected, wide, weight), strict=True):
        assert_close(a, b.float())


def test_a_whole_sequence_has_the_gradient_of_its_dense_beginning_and_its_sparse_rest() -> None:
    geometry = replace(SMALL, dense_len=110)
    inputs = [x.requires_grad_() for x in qkv(125, 125, G=1)]
    weight = torch.randn(1, 125, 2, V, device=DEVICE)
    results = [attend(*inputs, None, geometry, backend, start=0) for backend in ("triton", "eager")]
    assert_close(*results)
    for a, b in zip(*(gradients(out, inputs, weight) for out in results), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("T", [1, 17])
def test_the_first_window_counts_for_the_second_block(T: int) -> None:
    geometry = replace(SMALL, kernel_size=32, kernel_stride=16, topk=3)  # one free block
    q, k = torch.zeros(1, T, 1, K, device=DEVICE), torch.zeros(1, 336, 1, K, device=DEVICE)
    q[..., 0], k[0, :16, 0, 0], k[0, 80:96, 0, 0] = 4, 4, 2
    table = select(q, k, torch.full((1, T), 319, device=DEVICE), geometry)
    assert table.tolist() == [[[[0, 1, 17, 18, 19]]] * T]


def test_a_window_that_ends_in_the_future_counts_for_no_block() -> None:
    geometry = replace(SMALL, init_blocks=0, window_size=0, topk=2)
    q, k = torch.zeros(1, 2, 1, K, device=DEVICE), torch.zeros(1, 112, 1, K, device=DEVICE)
    # the window of tokens 92..99 starts in block 5; a neighbour in the tile sees it
    q[..., 0], k[0, 98:100, 0, 0], k[0, 32:40, 0, 0] = 4, 40, 1
    assert select(q, k, torch.tensor([[97, 111]], device=DEVICE), geometry).tolist() == [[[[2, 6]], [[5, 6]]]]


def test_blocks_are_scored_some_at_a_time_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_module, "SCORE_BLOCKS", 16)
    q, k, _ = qkv(17, 336, G=1, group=1)
    assert torch.equal(select(q, k, run(319, 17), SMALL), select(q, k, run(319, 17), SMALL, "reference"))
    # of the sixteen blocks before its own a query at 271 does not see the last one's last window, tokens 248..279
    geometry = SparseGeometry(32, 8, 0, 16, 0, 2, 0)
    q[..., 0], k[0, 272:, 0, 0] = 4, 40
    assert torch.equal(
        select(q[:, :1], k, run(271, 1), geometry), select(q[:, :1], k, run(271, 1), geometry, "reference")
    )


def test_each_part_of_the_windows_counts_once_in_a_normaliser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_module, "FEW_SPLIT_WINDOWS", 4)
    geometry = replace(SMALL, topk=3)  # one free block
    q, k = torch.zeros(1, 1, 2, K, device=DEVICE), torch.zeros(1, 320, 1, K, device=DEVICE)
    # one head likes an early block, the other a late one a little more
    q[0, 0, 0, 0] = q[0, 0, 1, 1] = 4
    k[0, 48:64, 0, 0], k[0, 224:240, 0, 1] = 4, 4.2
    assert select(q, k, run(319, 1), geometry).tolist() == [[[[0, 14, 17, 18, 19]]]]


def test_a_single_coarse_window_is_a_normaliser() -> None:
    geometry = SparseGeometry(16, 8, 1, 8, 0, 4, 0)
    q, k, _ = qkv(17, 96, G=1, group=4)
    # of 64 tokens, 32 apart
    assert torch.equal(select(q, k, run(63, 17), geometry), select(q, k, run(63, 17), geometry, "reference"))


def test_a_block_that_only_a_neighbour_chose_has_no_weight_however_high_it_scores() -> None:
    _, _, v = qkv(2, 320, G=1)
    q, k = torch.zeros(1, 2, 1, K, device=DEVICE), torch.zeros(1, 320, 1, K, device=DEVICE)
    q[0, 0, 0, 0] = q[0, 1, 0, 1] = 1
    # for the first query keys of block 3 weigh 2^200 times the others, and windows there nothing
    k[0, 48:64:2, 0, 0], k[0, 49:64:2, 0, 0], k[0, 48:64, 0, 1], k[0, 80:112, 0, 0] = 400, -400, 1, 1
    table = select(q, k, run(318, 2), SMALL)
    assert 3 not in table[0, 0] and 3 in table[0, 1]
    assert_close(attend(q, k, v, run(318, 2), SMALL), attend(q, k, v, run(318, 2), SMALL, "reference"))


def test_the_sequence_rule_looks_at_the_rows_last_position() -> None:
    geometry = replace(SMALL, dense_rule="sequence", dense_len=140)
    q, k, v = qkv(3, 140, B=2, G=1)
    # the first row's context is long enough, by its last query, the second's is not
    positions = torch.tensor([[130, 120, 139], [130, 120, 138]], device=DEVICE)
    expected = attend(q, k, v, positions, geometry, "reference")
    assert_close(attend(q, k, v, positions, geometry), expected)


def test_two_prefills_and_decoding_are_one_call() -> None:
    geometry = replace(SMALL, dense_len=108)
    q, k, v = qkv(132, 132, G=1)
    expected = attend(q, k, v, run(0, 132), geometry, "eager")
    for a, b in pairwise((100, 119, 131, 132)):
        assert_close(attend(q[:, a:b], k[:, :b], v[:, :b], run(a, b - a), geometry), expected[:, a:b])
        assert_close(attend(q[:, a:b], k[:, :b], v[:, :b], None, geometry, start=a), expected[:, a:b])


def test_long_calls_are_cut_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [x.requires_grad_() for x in qkv(40, 150, G=1)]
    weight = torch.randn(1, 40, 2, V, device=DEVICE)
    whole = attend(*inputs, run(110, 40), SMALL)
    monkeypatch.setattr(select_module, "PANEL_BYTES", 1)
    monkeypatch.setattr(select_module, "SCORE_ROWS", 16)
    monkeypatch.setattr(backward_module, "QUERIES", 13)
    cut = attend(*inputs, run(110, 40), SMALL)
    assert_close(cut, whole)
    with torch.no_grad():
        assert torch.equal(attend(*inputs, run(110, 40), SMALL), cut)
    expected = gradients(attend(*inputs, run(110, 40), SMALL, "eager"), inputs, weight)
    for a, b in zip(gradients(cut, inputs, weight), expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("T", [18, 2])
def test_blocks_and_windows_are_chosen_from_in_any_number_of_parts(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = qkv(T, 330, G=1)
    at_once = select(q, k, run(330 - T, T), SMALL)
    # 21 blocks by 16, scored by 8 where there are few queries, 19 coarse windows one by one
    for name in ("CHOICE_ELEMENTS", "FEW_CHOICE_ELEMENTS", "FEW_SPLIT_WINDOWS", "SCORE_WINDOWS"):
        monkeypatch.setattr(select_module, name, 1)
    monkeypatch.setattr(select_module, "FEW_SPLIT_BLOCKS", 8)
    assert torch.equal(select(q, k, run(330 - T, T), SMALL), at_once)
    assert torch.equal(at_once, select(q, k, run(330 - T, T), SMALL, "reference"))
    # where all score the same those of the first part are taken
    k = k[:, :1].expand_as(k)
    assert torch.equal(select(q, k, run(330 - T, T), SMALL), select(q, k, run(330 - T, T), SMALL, "reference"))


@pytest.mark.parametrize("T", [20, 1])
def test_rows_are_independent_and_memory_behind_them_is_not_read(T: int) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(T, 190, B=3, G=1))
    positions = torch.full((3, T), -1, device=DEVICE)
    positions[0, T // 2 :] = run(180 - T, T)[0, T // 2 :]
    positions[1] = run(150 - T, T)
    k1, k2 = tiers(k.detach(), SMALL)
    alone = [attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], positions[b : b + 1], SMALL, "reference") for b in (0, 1)]
    expected = torch.cat([*alone, torch.zeros_like(alone[0])]).detach()
    with torch.no_grad():
        q[positions < 0] = torch.nan
        for b, end in enumerate((180, 150, 0)):
            k[b, end:] = v[b, end:] = torch.nan
            k1[b, num_windows(end, 8, 4) :] = k2[b, num_windows(end, 32, 16) :] = torch.nan
    actual = infllm_attention(q, k, v, k1, k2, positions, SMALL, scale=SCALE, backend="triton")
    assert_close(actual.detach(), expected)
    assert not actual[positions < 0].any()
    weight = torch.ones_like(actual)
    weight[positions < 0] = torch.nan
    for x in torch.autograd.grad(actual, (q, k, v), weight):
        assert x.isfinite().all()


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=["float16", "bfloat16"]
)
def test_half_precision_is_near_the_definition(dtype: torch.dtype) -> None:
    inputs = [x.requires_grad_() for x in qkv(17, 150, G=1, group=4, dtype=dtype)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    compressed = tiers(inputs[1].detach(), SMALL)
    weight = torch.randn(1, 17, 4, V, device=DEVICE)
    results = [
        infllm_attention(*tensors, *compressed, run(133, 17), SMALL, scale=SCALE, backend=backend)
        for tensors, backend in ((inputs, "triton"), (wide, "reference"))
    ]
    assert_close(results[0], results[1].to(dtype))
    for a, b in zip(gradients(results[0], inputs, weight), gradients(results[1], wide, weight), strict=True):
        assert_close(a, b.to(dtype))


def test_any_strides_are_read() -> None:
    q, k, v = qkv(18, 150, G=1)
    expected = attend(q, k, v, run(132, 18), SMALL)
    q, k, v = (torch.randn(*x.shape, 2, device=DEVICE).select(-1, 0).copy_(x) for x in (q, k, v))
    assert torch.equal(attend(q, k, v, run(132, 18).int(), SMALL), expected)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(attend(q, k, v, run(132, 18), SMALL), expected)


def test_an_empty_call_is_empty() -> None:
    q, k, v = qkv(0, 150)
    assert kernels.attend(q, k, v, *tiers(k, SMALL), None, SMALL, SCALE, 150).shape == (1, 0, 4, V)
    assert select(q, k, run(0, 0), SMALL).shape == (1, 0, 2, 6)


def test_working_memory_is_bounded_whatever_the_number_of_queries_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_module, "SCORE_ROWS", 16)
    monkeypatch.setattr(select_module, "PANEL_BYTES", 2**14)
    # nothing is run: what is asked for is counted
    for module in (select_module, attend_module):
        for kernel in ("_choose", "_attend", "normalizers", "score_blocks"):
            if hasattr(module, kernel):
                monkeypatch.setattr(module, kernel, _Nothing())
    sizes: list[int] = []
    empty = torch.empty

    def counted(*size: Any, **options: Any) -> Tensor:
        result = empty(*size, **options)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "empty", counted)
    T = 4096
    q, k, v = qkv(T, T, G=1)
    kernels.attend(q, k, v, *tiers(k, SMALL), None, SMALL, SCALE, 0)
    assert sizes and max(sizes) * 4 <= 2**14 + 2 * 16 * 4 * T // SMALL.block_size < T * T // SMALL.block_size


class _Nothing:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


def test_torch_can_reason_about_every_operator() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv(3, 110, G=1))
    k1, k2 = tiers(k.detach(), SMALL)
    numbers, positions, first_sparse = SMALL.numbers, run(107, 3).int().contiguous(), torch.zeros(1)
    table = torch.arange(7, dtype=torch.int32, device=DEVICE)[None]
    pages = [x.detach().view(1, 7, 16, *x.shape[2:])[0] for x in (F.pad(x, (0, 0, 0, 0, 0, 2)) for x in (k, v))]
    lists = positions, first_sparse.int().to(DEVICE)
    operators = torch.ops.sala
    attended = (q, k, v, k1, k2, *lists, None, numbers, 0, SCALE, True)
    out, *kept = operators.infllm_triton_attend(*attended)
    calls = [
        (operators.infllm_triton_compress, (k.detach(), 8, 4)),
        (operators.infllm_triton_select, (q.detach(), k1, k2, positions, numbers, SCALE)),
        (operators.infllm_triton_attend, attended),
        (operators.infllm_triton_attend, (q.detach(), *pages, k1, k2, *lists, table, numbers, 0, SCALE, False)),
        (
            operators.infllm_triton_gradients,
            tuple(x.detach() if isinstance(x, Tensor) else x for x in (out, q, k, v, positions, out, *kept, 16, SCALE)),
        ),
    ]
    for operator, inputs in calls:
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator.default, inputs, test_utils=checks)


def test_what_the_kernels_do_not_take_is_refused() -> None:
    q, k, v = qkv(3, 150)
    with pytest.raises(BackendError, match="a tensor is torch.float64; it takes float32, bfloat16 and float16"):
        attend(q.double(), k.double(), v.double(), run(147, 3), SMALL)
    with pytest.raises(InputError, match="values on meta, queries on"):
        attend(q, k, v.to("meta"), run(147, 3), SMALL)
    with pytest.raises(BackendError, match="a tensor is on meta; it runs on"):
        attend(*(x.to("meta") for x in (q, k, v)), None, SMALL, start=147)
    with pytest.raises(BackendError, match="heads are 264 wide; it takes up to 256"):
        attend(*(x.repeat(1, 1, 1, 33) for x in (q, k)), v, run(147, 3), SMALL)
    with pytest.raises(BackendError, match="65 heads share a key of 8 numbers; it takes up to 32"):
        attend(q.repeat_interleave(65, 2)[:, :, :130], k, v, run(147, 3), SMALL)
    with pytest.raises(BackendError, match="takes groups of at most 32 heads, not of 65"):
        kernels.attend(q.repeat_interleave(65, 2)[:, :, :130], k, v, k, k, None, SMALL, SCALE, 147)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_the_released_shape_is_near_eager_on_a_device(backward: bool) -> None:
    geometry = SparseGeometry(topk=32, dense_len=0)
    T = 6144 if backward else 16384
    shapes = (1, T, 32, 128), (1, T, 2, 128), (1, T, 2, 128)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(backward) for shape in shapes]
    weight = torch.randn(1, T, 32, 128, device="cuda")
    results = [
        infllm_attention(*inputs, None, None, None, geometry, scale=128**-0.5, start=0, backend=backend)
        for backend in ("triton", "eager")
    ]
    # of nearly equal scores either may win
    differs = (results[0] - results[1]).abs().amax((0, 2, 3)) > 2e-2 * results[1].abs().max()
    assert differs.float().mean() < 0.02
    if backward:
        for a, b in zip(*(gradients(out, inputs, weight) for out in results), strict=True):
            assert (a - b).float().norm() < 3e-2 * b.float().norm()
