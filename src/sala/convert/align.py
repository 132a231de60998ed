"""HALO stage 1: every layer's linear twin learns the attention layer that it may replace."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sala.model import MiniCPMSALAConfig


class Sample(Protocol):
    """Tokens to measure on: windows (B, T), or packed documents (1, N) with their ends, `cu_seqlens`, on the CPU.

    real: bool, False on padding, which nothing is measured on; None when there is none.
    """

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def real(self) -> Tensor | None: ...
    @property
    def cu_seqlens(self) -> Tensor | None: ...


def inputs_of(sample: Sample, model: Any) -> dict[str, Tensor]:
    """Return what `model` reads of a sample, by the names of its arguments."""
    inputs = {"input_ids": sample.input_ids.to(model.device)}
    return inputs if sample.cu_seqlens is None else inputs | {"cu_seqlens": sample.cu_seqlens}


def real_tokens(values_BTX: Tensor, sample: Sample) -> Tensor:
    """Return (N, ...) of (B, T, ...): the values of the tokens that are no padding."""
    return values_BTX.flatten(0, 1) if sample.real is None else values_BTX[sample.real.to(values_BTX.device)]


class LinearTwins(nn.Module):
    """The linear twin of every attention layer, beside the frozen teacher.

    A twin sees its layer's normed input in the teacher and answers with what the layer adds after its output
    projection; the teacher's own output flows on, so the layers are independent problems. Source: HALO section 4.1.
    """

    def __init__(self, teacher: Any, twins: Sequence[nn.Module], config: MiniCPMSALAConfig | None = None) -> None:
        """Put `twins` beside `teacher`; config: of a model of the twins, for who counts their work."""
        super().__init__()
        self.config = config
        self.twins = nn.ModuleList(twins)
        # in a tuple the teacher is no submodule: it is not trained, saved or moved with the twins
        self._teacher = (teacher,)

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    def compilable(self) -> Iterable[nn.Module]:
        """The modules of equal structure that a trainer may compile one by one."""
        return self.twins

    def forward(self, input_ids: Tensor, **packing: Any) -> list[tuple[Tensor, Tensor]]:
        """Return (twin's output, teacher's output), each (B, T, D), for every layer of `input_ids` (B, T).

        packing: `cu_seqlens` and `context` of a packed row, as the decoder takes them.
        """
        layers = watch_mixers(self.teacher, input_ids, **packing)
        return [(twin(x_BTD, rows), y_BTD) for twin, (x_BTD, rows, y_BTD) in zip(self.twins, layers, strict=True)]


@torch.no_grad()
def watch_mixers(model: Any, input_ids: Tensor, **packing: Any) -> list[tuple[Tensor, Any, Tensor]]:
    """Return (input, rows, output) of every layer's mixer in one forward pass."""
    seen: list[tuple[Tensor, Any, Tensor]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        rows = keywords["rows"] if "rows" in keywords else arguments[1]
        seen.append((arguments[0], rows, output))

    with ExitStack() as stack:
        for layer in model.model.layers:
            stack.enter_context(layer.self_attn.register_forward_hook(note, with_kwargs=True))
        model.model(input_ids, use_cache=False, **packing)
    return seen


@contextmanager
def swapped(model: Any, mixers: Mapping[int, nn.Module]) -> Iterator[Any]:
    """`model` with the mixers of some layers exchanged inside `with`, and its own again after it."""
    layers = model.model.layers
    own = {index: layers[index].self_attn for index in mixers}
    try:
        for index, mixer in mixers.items():
            layers[index].self_attn = mixer
        yield model
    finally:
        for index, mixer in own.items():
            layers[index].self_attn = mixer
