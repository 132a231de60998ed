"""What candidates of a selection share: the states that enter a layer, computed once for all layers above it."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor, nn


class LowerStates:
    """The hidden states that enter one layer of a model, for every input that was seen; the layer only moves up.

    They take as much memory as the inputs have tokens, times the model's width.
    """

    def __init__(self) -> None:
        # (layer, what enters it) of every input, by a hash of its embeddings
        self._known: dict[bytes, tuple[int, Tensor]] = {}

    def __deepcopy__(self, memo: Any) -> Self:
        # a copy of a model on another device shares what is known
        return self

    @contextmanager
    def below(self, model: Any, layer: int) -> Iterator[None]:
        """Inside `with` calls of `model` without a cache begin at `layer`; those below it work once for an input."""
        layers = model.model.layers
        own = list(layers[:layer])
        try:
            for index in range(layer):
                layers[index] = _Passed(own[index]) if index else _First(self, own)
            yield
        finally:
            for index in range(layer):
                layers[index] = own[index]

    def entering(self, layers: nn.ModuleList, hidden_BTD: Tensor, rows: Any) -> Tensor:
        """Return what leaves the last of `layers`, of what enters the first."""
        name = hashlib.sha256(hidden_BTD.cpu().numpy().tobytes()).digest()
        known, state_BTD = self._known.get(name, (0, hidden_BTD))
        if known > len(layers):
            known, state_BTD = 0, hidden_BTD
        for layer in layers[known:]:
            state_BTD = layer(state_BTD, rows, None)
        self._known[name] = len(layers), state_BTD
        return state_BTD


class _Passed(nn.Module):
    """A layer whose work is done elsewhere."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn = layer.self_attn

    def forward(self, hidden_BTD: Tensor, rows: Any, cache: None) -> Tensor:
        return hidden_BTD


class _First(_Passed):
    """The first layer, in place of all those that are passed."""

    def __init__(self, states: LowerStates, layers: list[Any]) -> None:
        super().__init__(layers[0])
        self.states, self.layers = states, nn.ModuleList(layers)

    def forward(self, hidden_BTD: Tensor, rows: Any, cache: None) -> Tensor:
        return self.states.entering(self.layers, hidden_BTD, rows)
