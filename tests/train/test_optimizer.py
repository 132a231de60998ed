"""Which optimizer moves which parameter, and how fast."""

import pytest
import torch
from torch.optim import AdamW

from sala.recipe import Optimizer
from sala.train.muon import Muon
from sala.train.optimizer import make_optimizers

NAMES = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.q_proj.bias": (4,),
    "model.layers.0.self_attn.v_proj.bias": (4,),
    "model.norm.weight": (4,),
    "lm_head.weight": (8, 4),
}


def named() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in NAMES.items()}


def moved_by(settings: Optimizer) -> dict[str, tuple[type, float]]:
    parameters = named()
    found = {}
    for member, ratio in make_optimizers(parameters, settings).members:
        for group in member.param_groups:
            for parameter in group["params"]:
                (name,) = [name for name, own in parameters.items() if own is parameter]
                assert name not in found, "one optimizer a parameter"
                found[name] = (type(member), ratio)
    assert set(found) == set(NAMES)
    return found


def test_muon_moves_hidden_matrices_alone() -> None:
    found = moved_by(Optimizer(kind="muon", adamw_ratio=0.5, bias_ratio=3.0))
    assert {name for name, (kind, _) in found.items() if kind is Muon} == {"model.layers.0.self_attn.q_proj.weight"}
    assert found["model.layers.0.self_attn.q_proj.bias"] == (AdamW, 3.0)
    assert found["model.layers.0.self_attn.v_proj.bias"] == (AdamW, 0.5)
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == (AdamW, 0.5)


def test_adamw_moves_everything() -> None:
    assert set(moved_by(Optimizer()).values()) == {(AdamW, 1.0)}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_weights_decay_and_norms_and_biases_do_not(kind: str) -> None:
    parameters = named()
    optimizers = make_optimizers(parameters, Optimizer(kind=kind, weight_decay=0.5))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step(0.25)
    for name, shape in NAMES.items():
        wanted = torch.full(shape, 1 - 0.25 * 0.5 if len(shape) == 2 else 1.0)
        torch.testing.assert_close(parameters[name].detach(), wanted, msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_has_the_rate_it_is_given(kind: str) -> None:
    parameters = named()
    optimizers = make_optimizers(parameters, Optimizer(kind=kind))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(0.125)
    # the first step of AdamW is the rate itself
    torch.testing.assert_close(parameters["model.norm.weight"].detach(), torch.full((4,), 1 - 0.125))
    assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_has_every_parameter_also_one_that_never_moved(kind: str) -> None:
    parameters = named()
    optimizers = make_optimizers(parameters, Optimizer(kind=kind))
    moved, *others = parameters
    parameters[moved].grad = torch.ones_like(parameters[moved])
    optimizers.step(0.1)
    after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    state = optimizers.state
    assert state.keys() == parameters.keys()
    assert all(tensor.any() for tensor in state[moved].values())
    assert not any(tensor.any() for name in others for tensor in state[name].values())
    assert all(torch.equal(parameter, after[name]) for name, parameter in parameters.items())
