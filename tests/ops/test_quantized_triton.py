"""Laws of the kernel for GPUs that multiplies quantized weights, at sizes that Triton's interpreter gets through."""

import pytest
import torch

from devices import GPU
from ops.test_quantized import WEIGHTS, weight
from sala.ops import gpu
from sala.ops.quantized import QuantizedWeight, quantized_linear
from tolerances import assert_close

if (why_not := gpu.unavailable()) is not None:
    pytest.skip(why_not, allow_module_level=True)
if GPU:
    pytestmark = pytest.mark.gpu
DEVICE = "cuda" if GPU else "cpu"


def moved(w: QuantizedWeight) -> QuantizedWeight:
    parts = {
        name: part if (part := getattr(w, name)) is None else part.to(DEVICE)
        for name in ("words", "scales", "offsets", "order")
    }
    return QuantizedWeight(**parts, bits=w.bits, group=w.group, N=w.N, K=w.K)


@pytest.mark.parametrize("kind", WEIGHTS, ids=str)
@pytest.mark.parametrize(("offsets", "order", "rows"), [(False, False, 1), (True, True, 18)])
def test_the_kernel_is_the_definition(kind: tuple, offsets: bool, order: bool, rows: int) -> None:
    w = moved(weight(*kind, offsets, order)[0])
    x, bias = torch.randn(rows, w.K, device=DEVICE), torch.randn(w.N, device=DEVICE)
    for b in (None, bias):
        assert_close(quantized_linear(x, w, b, backend="triton"), quantized_linear(x, w, b, backend="reference"))


def test_half_numbers_and_rows_that_lie_apart() -> None:
    w = moved(weight(4, 32, 40, 64)[0])
    x = torch.randn(2, 3, 130, device=DEVICE, dtype=torch.float16)[..., 1:65]
    got = quantized_linear(x, w, backend="triton")
    expected = quantized_linear(x.float(), w, backend="reference")
    assert got.shape == (2, 3, 40) and (got.float() - expected).norm() < 2e-3 * expected.norm()
    assert quantized_linear(x[:0], w, backend="triton").shape == (0, 3, 40)
