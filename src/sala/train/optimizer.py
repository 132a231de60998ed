"""Optimizers by name: AdamW, and Muon for the layers' matrices with AdamW for the rest."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from sala.recipe import Optimizer
from sala.train.muon import Muon

Parameters = list[nn.Parameter]

# matrices of these names map tokens to vectors and back; orthogonal updates suit hidden layers only (Jordan 2024)
NOT_HIDDEN = ("embed_tokens", "lm_head")


class Optimizers:
    """The optimizers of one stage behind one learning rate."""

    def __init__(self, members: list[tuple[torch.optim.Optimizer, float]], names: Mapping[Tensor, str]) -> None:
        self.members, self.names = members, names

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """What is remembered of each parameter, by its name; zeros of one that has not moved yet."""
        new = [
            parameter
            for member, _ in self.members
            for group in member.param_groups
            for parameter in group["params"]
            if parameter not in member.state
        ]
        if new:
            self._begin(new)
        return {
            self.names[parameter]: dict(remembered)
            for member, _ in self.members
            for parameter, remembered in member.state.items()
        }

    def _begin(self, new: list[Tensor]) -> None:
        """Make the state that a first step would make: one without gradient or learning rate, which moves nothing."""
        for parameter in new:
            parameter.grad = torch.zeros_like(parameter)
        self.step(0.0)
        for member, _ in self.members:
            for parameter in new:
                for tensor in member.state.get(parameter, {}).values():
                    tensor.zero_()

    def step(self, learning_rate: float) -> None:
        """Move by the gradients, each member at its ratio of `learning_rate`, and forget the gradients."""
        for member, ratio in self.members:
            for group in member.param_groups:
                group["lr"] = learning_rate * ratio
            member.step()
            member.zero_grad(set_to_none=True)


def _adamw(parameters: Parameters, settings: Optimizer) -> AdamW:
    # a norm or a bias is a size of its own, not a weight that could be smaller
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], betas=settings.betas, eps=settings.epsilon, fused=True)


def _muon(parameters: Parameters, settings: Optimizer) -> Muon:
    return Muon(parameters, momentum=settings.momentum, weight_decay=settings.weight_decay)


# what moves the layers' matrices
MATRICES: dict[str, Callable[[Parameters, Optimizer], torch.optim.Optimizer]] = {"adamw": _adamw, "muon": _muon}


# numbers that an optimizer keeps of each that it moves: both moments, or one momentum
STATE_NUMBERS = {"adamw": 2, "muon": 1}


def grouped(named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, nn.Parameter]]:
    """Return parameters by name as the layers' matrices, the biases of queries and keys, and the rest."""
    groups: dict[str, dict[str, nn.Parameter]] = {"matrices": {}, "biases": {}, "rest": {}}
    for name, parameter in named.items():
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            groups["biases"][name] = parameter
        elif parameter.ndim == 2 and not any(part in NOT_HIDDEN for part in name.split(".")):
            groups["matrices"][name] = parameter
        else:
            groups["rest"][name] = parameter
    return groups


def make_optimizers(named: Mapping[str, nn.Parameter], settings: Optimizer) -> Optimizers:
    """Return the optimizers of a recipe's settings for parameters by name."""
    groups = {group: list(members.values()) for group, members in grouped(named).items()}
    bias_ratio = settings.adamw_ratio if settings.bias_ratio is None else settings.bias_ratio
    rows = (
        (groups["matrices"], MATRICES[settings.kind], 1.0),
        (groups["rest"], _adamw, settings.adamw_ratio),
        (groups["biases"], _adamw, bias_ratio),
    )
    members = [(make(parameters, settings), ratio) for parameters, make, ratio in rows if parameters]
    return Optimizers(members, {parameter: name for name, parameter in named.items()})
