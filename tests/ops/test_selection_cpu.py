"""Laws of the C++ behind the selection of blocks and the compression of keys, at every level of processor."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import levels
from sala.ops import native
from sala.ops.infllm import SparseGeometry, compress, eager, num_windows, reference
from tolerances import assert_close

K = 8
SCALE = K**-0.5
# six blocks of 16 tokens are read, two of them freely chosen
SMALL = SparseGeometry(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4, dense_len=100)

every_normalizer = pytest.mark.parametrize("normalizer", ["coarse", "exact"])


def run(start: int, T: int, B: int = 1) -> Tensor:
    return torch.arange(start, start + T).expand(B, T)


@pytest.fixture(params=levels.TESTED)
def level(request, cpp: ModuleType) -> Iterator[str]:
    with native.at_level(request.param):
        yield request.param


@pytest.fixture(scope="module")
def cpp() -> ModuleType:
    if (reason := native.unavailable()) is not None:
        pytest.skip(reason)
    return import_module("sala.ops.infllm.cpu")


def queries_and_tiers(
    T: int, S: int, G: int, group: int, K: int, geometry: SparseGeometry, dtype: torch.dtype = torch.float32, B: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(B, T, G * group, K).to(dtype), torch.randn(B, S, G, K).to(dtype)
    tiers = (geometry.kernel_size, geometry.kernel_stride), (geometry.coarse_size, geometry.coarse_stride)
    return (q, *(compress(k, size, stride) for size, stride in tiers))


@every_normalizer
@pytest.mark.parametrize(("block", "size", "stride"), [(16, 4, 2), (16, 32, 8), (64, 32, 16), (48, 5, 3), (16, 8, 1)])
@pytest.mark.parametrize(("G", "group", "width"), [(2, 1, 24), (2, 3, 7), (1, 16, 32)])
def test_every_level_selects_as_defined_for_few_queries_and_for_many(
    cpp: ModuleType, level: str, normalizer: str, block: int, size: int, stride: int, G: int, group: int, width: int
) -> None:
    geometry = SparseGeometry(size, stride, 1, block, block, 4, 0, normalizer)
    S = 40 * block + 5
    for T in (1, 9, 150):
        q, k1, k2 = queries_and_tiers(T, S, G, group, width, geometry)
        positions = run(S - T, T).clone()
        positions[0, : T // 2 : 3] = torch.arange(-1, 5 * block)[: len(positions[0, : T // 2 : 3])]
        expected = eager.select(q, k1, k2, positions, geometry, SCALE)
        assert torch.equal(cpp.select(q, k1, k2, positions, geometry, SCALE), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 24, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 5, 8, 16])
def test_every_head_width_and_group_selects_as_defined(
    cpp: ModuleType, level: str, dtype: torch.dtype, width: int, group: int
) -> None:
    for T in (2, 140):
        q, k1, k2 = queries_and_tiers(T, 400, 2, group, width, SMALL, dtype)
        actual = cpp.select(q, k1, k2, run(400 - T, T), SMALL, width**-0.5)
        assert torch.equal(actual, eager.select(q, k1, k2, run(400 - T, T), SMALL, width**-0.5))


@given(data=st.data())
@settings(max_examples=30)
def test_any_geometry_and_positions_select_as_defined(cpp: ModuleType, data: st.DataObject) -> None:
    def integer(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    stride, init, local = integer(1, 9), integer(0, 3), integer(0, 3)
    block = stride * integer(1, 9)
    geometry = SparseGeometry(
        stride * integer(1, 4) + integer(0, 3),
        stride,
        init,
        block,
        local * block,
        init + integer(1, 4),
        0,
        data.draw(st.sampled_from(["coarse", "exact"])),
    )
    B, T, G, group, S = integer(1, 2), integer(1, 12), integer(1, 3), integer(1, 20), integer(1, 600)
    q, k1, k2 = queries_and_tiers(T, S, G, group, integer(1, 40), geometry, B=B)
    positions = torch.tensor(data.draw(st.lists(st.integers(-1, S - 1), min_size=B * T, max_size=B * T))).view(B, T)
    actual = cpp.select(q, k1, k2, positions, geometry, SCALE)
    assert torch.equal(actual, reference.select(q, k1, k2, positions, geometry, SCALE))


@pytest.mark.parametrize("T", [3, 200])
def test_selection_reads_any_strides_and_integers(cpp: ModuleType, T: int) -> None:
    q, k1, k2 = queries_and_tiers(T, 600, 2, 4, 24, SMALL, B=3)
    positions = run(600 - T, T, 3)
    expected = cpp.select(q, k1, k2, positions, SMALL, SCALE)
    q, k1, k2 = (torch.randn(*x.shape, 2).select(-1, 0).copy_(x) for x in (q, k1, k2))
    assert torch.equal(cpp.select(q, k1, k2, positions.int(), SMALL, SCALE), expected)
    q, k1, k2 = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k1, k2))
    assert torch.equal(cpp.select(q, k1, k2, positions, SMALL, SCALE), expected)


@pytest.mark.parametrize("T", [3, 200])
def test_selection_is_the_same_on_two_threads_and_query_by_query(cpp: ModuleType, T: int) -> None:
    q, k1, k2 = queries_and_tiers(T, 20_000, 2, 4, 24, SMALL)
    positions = run(20_000 - T, T)
    expected = cpp.select(q, k1, k2, positions, SMALL, SCALE)
    torch.set_num_threads(2)
    try:
        assert torch.equal(cpp.select(q, k1, k2, positions, SMALL, SCALE), expected)
    finally:
        torch.set_num_threads(1)
    for t in range(0, T, 29):
        one = cpp.select(q[:, t : t + 1], k1, k2, positions[:, t : t + 1], SMALL, SCALE)
        assert torch.equal(one, expected[:, t : t + 1])


@pytest.mark.parametrize("T", [1, 200])
def test_selection_has_no_use_for_windows_that_are_not_numbers(cpp: ModuleType, T: int) -> None:
    q, k1, k2 = queries_and_tiers(T, 600, 2, 4, 24, SMALL)
    expected = cpp.select(q, k1, k2, run(500 - T, T), SMALL, SCALE)
    k1[:, num_windows(500, 8, 4) :] = k2[:, num_windows(500, 32, 16) :] = torch.nan
    assert torch.equal(cpp.select(q, k1, k2, run(500 - T, T), SMALL, SCALE), expected)
    # and where they are all visible, what comes out are blocks nevertheless
    table = cpp.select(q, torch.full_like(k1, torch.nan), k2, run(500 - T, T), SMALL, SCALE)
    assert (table.diff() > 0).all() and table.min() == 0 and table.max() == 31


@pytest.mark.parametrize("T", [1, 200])
@every_normalizer
def test_of_equal_scores_the_lower_block_wins_among_many(cpp: ModuleType, T: int, normalizer: str) -> None:
    geometry = replace(SMALL, topk=9, normalizer=normalizer)
    q, k1, k2 = torch.randn(1, T, 4, K), torch.randn(K).expand(1, 999, 2, K), torch.randn(K).expand(1, 247, 2, K)
    table = cpp.select(q, k1, k2, run(3999 - T, T), geometry, SCALE)
    assert (table[0, :, :, :8] == torch.arange(8)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [6, 32, 50])
def test_every_level_compresses_to_means(cpp: ModuleType, level: str, dtype: torch.dtype, width: int) -> None:
    k = torch.randn(2, 1500, 3, width).to(dtype)
    for size, stride in ((32, 16), (5, 3), (128, 64), (2000, 3)):
        expected = eager.compress(k.double(), size, stride).to(dtype)
        assert_close(cpp.compress(k, size, stride), expected)
        assert_close(cpp.compress(k.mT.contiguous().mT, size, stride), expected)
        assert torch.equal(cpp.compress(k[:, 3 * stride :], size, stride), cpp.compress(k, size, stride)[:, 3:])


def test_a_compiler_sees_the_shapes_of_what_cpp_returns(cpp: ModuleType) -> None:
    q, k1, k2 = queries_and_tiers(3, 600, 2, 4, 24, SMALL)
    with FakeTensorMode() as mode:
        q, k1, k2, positions = (mode.from_tensor(x) for x in (q, k1, k2, run(3, 3)))
        assert cpp.select(q, k1, k2, positions, SMALL, SCALE).shape == (1, 3, 2, SMALL.num_selected)
        assert cpp.compress(q, 2, 1).shape == (1, 2, 8, 24)
