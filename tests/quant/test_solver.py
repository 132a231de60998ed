"""Laws of rounding a matrix: what GPTQ leaves of the error, and what codes, scales and groups stand for."""

import pytest
import torch
from torch import Tensor

from sala.errors import CheckpointError
from sala.quant.solver import Solved, gptq, rtn

N, K = 24, 192


def problem(spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a weight and the sum of x x^T of inputs that depend on each other."""
    torch.manual_seed(0)
    x = torch.randn(600, K) @ torch.randn(K, K) * torch.logspace(0, spread, K)[torch.randperm(K)]
    return torch.randn(N, K), x.T @ x


def numbers(solved: Solved) -> Tensor:
    scale, zero = (part[solved.g_idx_K.long()].T for part in (solved.scales_GN, solved.zeros_GN))
    return scale.float() * (solved.codes_NK - zero)


@pytest.mark.parametrize("sym", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, K)])
def test_gptq_loses_less_than_rounding(bits: int, group: int, sym: bool) -> None:
    weight, hessian = problem()
    rounded = rtn(weight, hessian, bits, group, sym)
    for act_order in (False, True):
        solved = gptq(weight, hessian, bits, group, sym, act_order, 0.01)
        assert solved.error < 0.5 * rounded.error
        assert solved.codes_NK.min() >= 0 and solved.codes_NK.max() < 2**bits
        assert torch.bincount(solved.g_idx_K).tolist() == [min(group, K - first) for first in range(0, K, group)]
        lost = numbers(solved) - weight
        assert solved.error == pytest.approx(
            float((lost @ hessian * lost).sum() / (weight @ hessian * weight).sum()), rel=1e-3
        )


def test_inputs_that_are_independent_leave_nothing_to_make_up_for() -> None:
    weight, _ = problem()
    for group in (32, K):
        solved = gptq(weight, torch.eye(K), 8, group, True, False, 1e-6)
        assert (numbers(solved) - weight).abs().max() <= 0.51 * solved.scales_GN.float().max()


def test_act_order_helps_where_inputs_differ_in_size() -> None:
    weight, hessian = problem(spread=2.0)
    one, other = (gptq(weight, hessian, 4, K, True, act_order, 0.01) for act_order in (True, False))
    assert one.error < other.error
    largest = hessian.diagonal().argmax()
    assert gptq(weight, hessian, 4, 32, True, True, 0.01).g_idx_K[largest] == 0


def test_inputs_that_are_always_zero_or_equal_are_taken() -> None:
    weight, hessian = problem()
    hessian[:, 5] = hessian[5] = 0
    hessian[:, 7], hessian[7] = hessian[:, 6], hessian[6]
    solved = gptq(weight, hessian, 4, 32, True, False, 1e-9)
    assert solved.error < rtn(weight, hessian, 4, 32, True).error
    assert gptq(torch.zeros(N, K), hessian, 4, 32, True, False, 0.01).codes_NK.eq(8).all()


def test_inputs_that_are_not_finite_are_refused() -> None:
    weight, hessian = problem()
    hessian[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match="inputs are not finite; expected"):
        gptq(weight, hessian, 4, 32, True, False, 0.01)
