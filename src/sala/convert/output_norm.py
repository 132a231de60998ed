"""The size of every head at the start: output norms from what the teacher's heads put out."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sala.convert.align import LinearTwins, Sample, inputs_of, real_tokens, watch_mixers
from sala.convert.transfer import ZERO_GATE


@torch.no_grad()
def measure_output_norms(twins: LinearTwins, sample: Sample) -> list[list[float]]:
    """Return, for every layer and head, the factor by which the teacher's head is larger than the twin's.

    By root mean square over the tokens of `sample`, after the twin's output norm and gate.

    Heads with slow decay add up far more keys, so with weights of 1 they fill the norm that all heads share and the
    others start near zero. A deviation from HALO, which leaves that to alignment.
    """
    teacher = twins.teacher
    sizes: dict[int, Tensor] = {}

    def note(layer: int, num_heads: int, sizes: dict[int, Tensor], out_BTD: Tensor) -> None:
        heads_NHK = real_tokens(out_BTD, sample).unflatten(-1, (num_heads, -1)).float()
        sizes[layer] = heads_NHK.square().mean(dim=(0, 2)).sqrt()

    num_heads = teacher.config.num_attention_heads
    own: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for index, layer in enumerate(teacher.model.layers):
            hooked: Any = layer.self_attn.o_proj
            stack.enter_context(
                hooked.register_forward_pre_hook(lambda _, given, index=index: note(index, num_heads, sizes, given[0]))
            )
        layers = watch_mixers(teacher, **inputs_of(sample, teacher))
    for index, (twin, (x_BTD, rows, _)) in enumerate(zip(twins.twins, layers, strict=True)):
        mixer: Any = twin
        note(index, num_heads, own, mixer.o_norm(mixer.attend(x_BTD, rows).flatten(2)))
    factors = []
    for index, twin in enumerate(twins.twins):
        module: Any = twin
        gate: nn.Linear = module.z_proj
        # a gate with random weights lets through half on average; an open one is made up for in o_proj
        passed = ZERO_GATE if bool(gate.weight.any()) else 1.0
        ratio_H = sizes[index] / (own[index].clamp_min(torch.finfo(torch.float32).tiny) * passed)
        factors.append(ratio_H.tolist())
    return factors


@torch.no_grad()
def scale_output_norms(twins: LinearTwins, factors: Sequence[Sequence[float]]) -> None:
    """Multiply each twin's output norm by `factors`, one a layer and head (see `measure_output_norms`)."""
    for twin, row in zip(twins.twins, factors, strict=True):
        module: Any = twin
        weight: Tensor = module.o_norm.weight
        weight.mul_(weight.new_tensor(row).repeat_interleave(len(weight) // len(row)))
