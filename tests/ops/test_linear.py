"""Laws of the linear map: every backend against the definition, whatever stands beside a row."""

import pytest
import torch
from torch import Tensor

import levels
from sala.errors import BackendError, InputError
from sala.ops import native
from sala.ops.dispatch import BACKENDS, choose, unavailable
from sala.ops.linear import linear
from sala.ops.native.operator import FEW_ROWS
from tolerances import assert_close

every_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS["linear"] if name != "reference"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
every_level = pytest.mark.parametrize("level", levels.TESTED)
with_cpu = pytest.mark.skipif(unavailable("linear", "cpu") is not None, reason="no C++ here")

# odd sizes, whole steps of every vector width, and more rows of the weight than one task has
SHAPES = [(1, 1, 1), (1, 9, 63), (3, 130, 31), (5, 33, 64), (8, 7, 130), (2, 1100, 96), (1, 64, 576)]


def tensors(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(M * 10007 + N * 101 + K)
    return torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.randn(N).to(dtype)


@every_backend
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_is_the_definition(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, weight, bias = tensors(*shape, dtype)
    for b in (None, bias):
        assert_close(linear(x, weight, b, backend=backend), linear(x, weight, b, backend="reference"))


@with_cpu
@every_level
@every_dtype
def test_every_level_is_the_definition(level: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, weight, bias = tensors(*shape, dtype)
        with native.at_level(level):
            assert_close(linear(x, weight, bias, backend="cpu"), linear(x, weight, bias, backend="reference"))


@with_cpu
@every_dtype
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    x, weight, bias = tensors(FEW_ROWS, 77, 130, dtype)
    for rows in range(1, FEW_ROWS + 1):
        together = linear(x[:rows], weight, bias, backend="cpu")
        alone = torch.cat([linear(x[i : i + 1], weight, bias, backend="cpu") for i in range(rows)])
        assert torch.equal(together, alone)


@with_cpu
@every_dtype
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    # enough weights to be shared among threads
    x, weight, bias = tensors(3, 1003, 576, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear(x, weight, bias, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@with_cpu
@every_dtype
def test_rows_may_lie_apart_in_memory(dtype: torch.dtype) -> None:
    x, weight, _ = tensors(4, 20, 66, dtype)
    apart, part = x[:, 1:65][::2], weight[:, 2:66][3:]
    assert torch.equal(linear(apart, part, backend="cpu"), linear(apart.contiguous(), part.contiguous(), backend="cpu"))
    turned = torch.randn(64, 9).to(dtype).T
    assert torch.equal(linear(apart, turned, backend="cpu"), linear(apart, turned.contiguous(), backend="cpu"))


@every_backend
def test_leading_dimensions_are_kept(backend: str) -> None:
    x, weight, bias = torch.randn(2, 3, 16), torch.randn(5, 16), torch.randn(5)
    for shape in ((2, 3, 16), (6, 16), (0, 16), (2, 0, 16)):
        given = x.flatten()[: torch.Size(shape).numel()].view(shape)
        out = linear(given, weight, bias, backend=backend)
        assert out.shape == (*shape[:-1], 5)
        assert_close(out, linear(given, weight, bias, backend="reference"))
    assert linear(x[0, 0], weight, backend=backend).shape == (5,)


@with_cpu
def test_the_kernel_is_chosen_for_few_rows_without_a_gradient_and_nothing_else() -> None:
    weight = torch.randn(4, 16)

    def chosen(*given: Tensor | None) -> str:
        return choose("linear", "auto", given).__name__.rpartition(".")[2]

    assert chosen(torch.randn(FEW_ROWS, 16), weight, None) == "cpu"
    assert chosen(torch.randn(FEW_ROWS + 1, 16), weight, None) == "eager"
    assert chosen(torch.randn(1, 16), weight.clone().requires_grad_(), None) == "eager"
    assert chosen(torch.randn(1, 16).bfloat16(), weight, None) == "eager"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen(torch.randn(1, 16), weight, None) == "eager"
    with pytest.raises(BackendError, match=f"has {FEW_ROWS + 1} rows"):
        linear(torch.randn(FEW_ROWS + 1, 16), weight, backend="cpu")


@with_cpu
def test_a_tensor_that_is_more_than_numbers_goes_to_torch() -> None:
    class Packed(Tensor):
        pass

    weight = torch.randn(4, 16).as_subclass(Packed)
    assert choose("linear", "auto", (torch.randn(1, 16), weight, None)).__name__.endswith("eager")


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.randn(2, 16), torch.randn(4, 16)
    with pytest.raises(InputError, match=r"expected \(..., K\) and \(N, K\)"):
        linear(x, weight[:, :8])
    with pytest.raises(InputError, match=r"expected \(4,\)"):
        linear(x, weight, torch.randn(5))
    with pytest.raises(InputError, match="expected floating point"):
        linear(x.int(), weight)
