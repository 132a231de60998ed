"""Transforms of torch.func take the model as a function: gradients of one example, and of several at a time."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from model.shapes import tiny_model, tokens
from sala.errors import InputError

# from 64 tokens on blocks are chosen
LENGTHS = [40, 180]


def setup(length: int) -> tuple:
    model, ids = tiny_model(), tokens(2, length)

    def loss(parameters: dict[str, Tensor], row_T: Tensor) -> Tensor:
        return functional_call(model, parameters, (row_T[None],), {"labels": row_T[None]}).loss

    return model, ids, loss, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("length", LENGTHS)
def test_gradients_are_those_of_the_backward_pass(length: int) -> None:
    model, ids, loss, parameters = setup(length)
    gradients = grad(loss)(parameters, ids[0])
    model(ids[:1], labels=ids[:1]).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_every_example_at_once_are_those_of_each() -> None:
    _, ids, loss, parameters = setup(LENGTHS[0])
    together = vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
    for row, row_T in enumerate(ids):
        for name, gradient in grad(loss)(parameters, row_T).items():
            torch.testing.assert_close(together[name][row], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_several_examples_that_choose_blocks_are_refused() -> None:
    _, ids, loss, parameters = setup(LENGTHS[1])
    with pytest.raises(InputError, match="vmap over queries that choose blocks"):
        vmap(grad(loss), in_dims=(None, 0))(parameters, ids)
