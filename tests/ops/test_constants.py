"""Laws of the numbers that a configuration fixes."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sala.ops.constants import constant

CPU = torch.device("cpu")


def test_numbers_are_sent_to_a_device_once() -> None:
    sent = constant((0.5, 2.0), CPU)
    assert sent.tolist() == [0.5, 2.0]
    assert constant((0.5, 2.0), CPU) is sent
    assert constant((0.5, 3.0), CPU) is not sent


def test_what_inference_asked_for_first_can_be_trained_with() -> None:
    with torch.inference_mode():
        constant((1.0, 7.0), CPU)
    x = torch.ones(2, requires_grad=True)
    (x * constant((1.0, 7.0), CPU)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 7]


def test_a_tracer_leaves_nothing_behind() -> None:
    with FakeTensorMode():
        assert isinstance(constant((1.0, 8.0), CPU), FakeTensor)
    assert not isinstance(constant((1.0, 8.0), CPU), FakeTensor)


@pytest.mark.parametrize("broken", [False, True])
def test_compiled_functions_take_them_as_steps(broken: bool) -> None:
    def call(x: Tensor) -> Tensor:
        numbers = constant((1.0, 9.0), x.device)
        if broken:
            torch._dynamo.graph_break()
        return x * numbers + constant((2.0, 9.0), x.device)

    compiled = torch.compile(call, fullgraph=not broken, backend="aot_eager")
    assert compiled(torch.ones(2)).tolist() == [3, 18]
    assert not isinstance(constant((1.0, 9.0), CPU), FakeTensor)
