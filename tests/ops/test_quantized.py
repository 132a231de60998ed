"""Laws of the linear map with a quantized weight: every backend against the definition, and what packing keeps."""

import pytest
import torch
from torch import Tensor

import levels
from sala.errors import BackendError, InputError
from sala.ops import native
from sala.ops.dispatch import BACKENDS, unavailable
from sala.ops.quantized import (
    QuantizedWeight,
    dequantize,
    pack_codes,
    pack_words,
    quantized_linear,
    unpack_words,
    words_of,
)
from tolerances import assert_close

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
every_level = pytest.mark.parametrize("level", levels.TESTED)
with_cpu = pytest.mark.skipif(unavailable("quantized", "cpu") is not None, reason="no C++ here")

# (bits, group, N, K): odd sizes, a last group that is not whole, rows as one group of one and of several blocks
WEIGHTS = [(4, 32, 1, 40), (4, 64, 40, 576), (4, 128, 33, 200), (4, 8, 17, 31), (8, 63, 7, 63), (8, 576, 70, 576)]
WEIGHTS += [(8, 32, 130, 96), (4, 300, 16, 300), (8, 256, 20, 600)]
MANY = 21


def weight(
    bits: int, group: int, N: int, K: int, offsets: bool = False, order: bool = False
) -> tuple[QuantizedWeight, Tensor]:
    """Return a matrix and its codes."""
    torch.manual_seed(N * 101 + K)
    groups = -(-K // group)
    codes_NK = torch.randint(0, 2**bits, (N, K))
    scales = (torch.rand(groups, N) + 0.5).half() / 2**bits
    given = torch.randn(groups, N) if offsets else None
    return pack_codes(codes_NK, scales, given, bits, group, torch.randperm(K) if order else None), codes_NK


def rounded(x: Tensor, w: QuantizedWeight) -> Tensor:
    """Return what the C++ makes of x: 8 bits a number, by blocks in the order of the codes."""
    if w.order is not None:
        x = x[..., w.order.long()]
    parts = x.float().split(min(w.group, 128, -(-w.K // 8) * 8), dim=-1)
    highest = [part.abs().amax(-1, keepdim=True) for part in parts]
    together = torch.cat(
        [(part * (127 / top)).round() * (top / 127) for part, top in zip(parts, highest, strict=True)], -1
    )
    return together if w.order is None else torch.empty_like(together).index_copy_(-1, w.order.long(), together)


@pytest.mark.parametrize("kind", WEIGHTS, ids=str)
@pytest.mark.parametrize("offsets", [False, True], ids=["centred", "offsets"])
@pytest.mark.parametrize("order", [False, True], ids=["in order", "act-order"])
def test_a_weight_is_scale_times_code_plus_offset(kind: tuple, offsets: bool, order: bool) -> None:
    w, codes_NK = weight(*kind, offsets, order)
    group_K = torch.arange(w.K) // w.group
    expected = w.scales[:, : w.N].T[:, group_K].double() * (codes_NK - 2 ** (w.bits - 1))
    if w.offsets is not None:
        expected += w.offsets[:, : w.N].T[:, group_K]
    got = dequantize(w, torch.float64)
    assert torch.equal(got if w.order is None else got[:, w.order.long()], expected)
    assert torch.equal(dequantize(w, torch.float64, 16, 20), got[16:20])


@pytest.mark.parametrize("kind", WEIGHTS, ids=str)
def test_words_of_gptq_are_kept_bit_for_bit(kind: tuple) -> None:
    w, codes_NK = weight(*kind)
    qweight = words_of(codes_NK, w.bits)
    assert torch.equal(unpack_words(w), qweight)
    again = pack_words(qweight, w.N, w.K, w.scales[:, : w.N], None, w.bits, w.group)
    assert torch.equal(again.words, w.words)


def test_the_first_code_stands_in_the_lowest_bits() -> None:
    assert words_of(torch.arange(1, 9)[None], 4).tolist() == [[0x87654321 - 2**32]]
    assert words_of(torch.tensor([[1, 2, 3]]), 8).tolist() == [[0x00030201]]


@every_dtype
@pytest.mark.parametrize("kind", WEIGHTS, ids=str)
@pytest.mark.parametrize("offsets", [False, True], ids=["centred", "offsets"])
def test_torch_computes_the_definition(dtype: torch.dtype, kind: tuple, offsets: bool) -> None:
    w, _ = weight(*kind, offsets)
    x, bias = torch.randn(3, w.K).to(dtype), torch.randn(w.N).to(dtype)
    for b in (None, bias):
        expected = quantized_linear(x, w, b, backend="reference").float()
        error = (quantized_linear(x, w, b, backend="eager").float() - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@with_cpu
@every_level
def test_every_level_multiplies_x_rounded_to_8_bits(level: str) -> None:
    for kind in WEIGHTS:
        for offsets, order, rows in ((False, False, 1), (True, True, 5), (False, True, MANY), (True, False, MANY)):
            w, _ = weight(*kind, offsets, order)
            x, bias = torch.randn(rows, w.K), torch.randn(w.N)
            with native.at_level(level):
                got = quantized_linear(x, w, bias, backend="cpu")
                small = quantized_linear(x.bfloat16(), w, bias.bfloat16(), backend="cpu")
            assert_close(got, quantized_linear(rounded(x, w), w, bias, backend="reference"))
            exact = quantized_linear(rounded(x.bfloat16(), w), w, bias.bfloat16().float(), backend="reference")
            assert_close(small, exact.bfloat16())


@with_cpu
def test_rounding_x_costs_less_than_a_hundredth() -> None:
    w, _ = weight(4, 128, 256, 1024)
    x = torch.randn(4, 1024)
    exact = quantized_linear(x, w, backend="reference")
    assert 0.001 < (quantized_linear(x, w, backend="cpu") - exact).norm() / exact.norm() < 0.01


@with_cpu
@every_dtype
def test_a_row_has_the_same_bits_alone_and_among_many(dtype: torch.dtype) -> None:
    for kind in ((4, 64, 90, 200), (8, 200, 90, 200)):
        w, _ = weight(*kind, offsets=True)
        x = torch.randn(2 * MANY, w.K).to(dtype)
        alone = torch.cat([quantized_linear(row[None], w, backend="cpu") for row in x])
        for rows in (2, 7, 8, 9, 2 * MANY):
            assert torch.equal(quantized_linear(x[:rows], w, backend="cpu"), alone[:rows])


@with_cpu
@pytest.mark.parametrize("rows", [3, MANY])
def test_any_number_of_threads_multiplies_to_the_same_bits(rows: int) -> None:
    w, _ = weight(4, 64, 1003, 576)
    x, before, results = torch.randn(rows, w.K), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(quantized_linear(x, w, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@with_cpu
def test_a_row_that_is_not_finite_gives_nan_and_leaves_the_others() -> None:
    w, _ = weight(4, 32, 20, 64)
    x = torch.randn(3, 64)
    whole = quantized_linear(x, w, backend="cpu")
    for bad in (float("nan"), float("inf")):
        x[1, 40] = bad
        got = quantized_linear(x, w, backend="cpu")
        assert got[1].isnan().all() and torch.equal(got[::2], whole[::2])
    assert torch.equal(quantized_linear(torch.zeros(1, 64), w, backend="cpu"), torch.zeros(1, 20))


def test_what_goes_before_the_last_dimension_is_kept() -> None:
    w, _ = weight(4, 32, 20, 64)
    for backend in BACKENDS["quantized"]:
        for shape in ((2, 3, 64), (0, 64), (64,)):
            assert quantized_linear(torch.randn(shape), w, backend=backend).shape == (*shape[:-1], 20)


def test_a_gradient_of_x_goes_through_torch() -> None:
    w, _ = weight(4, 32, 20, 64)
    x = torch.randn(3, 64, requires_grad=True)
    quantized_linear(x, w).sum().backward()
    assert_close(x.grad, dequantize(w, torch.float32).sum(0).expand(3, -1))
    with pytest.raises(BackendError, match="a gradient is wanted"):
        quantized_linear(x, w, backend="cpu")


def test_what_no_kernel_takes_is_refused() -> None:
    w, codes_NK = weight(4, 32, 20, 64)
    with pytest.raises(InputError, match=r"expected \(\.\.\., 64\)"):
        quantized_linear(torch.randn(2, 32), w)
    with pytest.raises(InputError, match=r"expected \(20,\)"):
        quantized_linear(torch.randn(2, 64), w, torch.randn(5))
    with pytest.raises(InputError, match="expected floating point"):
        quantized_linear(torch.ones(2, 64, dtype=torch.long), w)
    with pytest.raises(InputError, match="group = 20; expected a multiple of 8"):
        pack_codes(codes_NK, torch.ones(4, 20), None, 4, 20)
    with pytest.raises(InputError, match="bits = 3; expected 4 or 8"):
        pack_codes(codes_NK, torch.ones(2, 20), None, 3, 32)
