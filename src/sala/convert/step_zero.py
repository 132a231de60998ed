"""What each kind of change costs a teacher before any training, in KL(teacher || changed teacher)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sala.convert.align import Sample, inputs_of, real_tokens, swapped
from sala.convert.transfer import hybrid_config, kept_attention
from sala.model.kinds import LIGHTNING
from sala.recipe import Conversion


@torch.no_grad()
def log_probs(model: Any, sample: Sample) -> Tensor:
    """Return (N, X), what a model says after every token of a sample that is no padding."""
    logits_BTX = model(**inputs_of(sample, model), use_cache=False).logits
    return real_tokens(logits_BTX, sample).float().log_softmax(dim=-1)


def divergence(teacher_NX: Tensor, model: Any, sample: Sample) -> float:
    """Return the mean KL(teacher || model) in nats a token; `teacher_NX` holds the teacher's log-probabilities."""
    own_NX = log_probs(model, sample)
    return (teacher_NX.exp() * (teacher_NX - own_NX)).sum(dim=-1).mean().item()


def measure_step_zero(
    teacher: Any, settings: Conversion, kinds: Sequence[str], mixers: dict[int, nn.Module], sample: Sample
) -> dict[str, float]:
    """Return what each kind of change alone costs the teacher, and all of them together."""
    kept = [layer for layer, kind in enumerate(kinds) if kind != LIGHTNING]
    linear = {layer: mixer for layer, mixer in mixers.items() if layer not in kept}

    def attention(rope: bool, gates: bool) -> dict[int, nn.Module]:
        config = hybrid_config(teacher.config, kinds, rope=rope, gates=gates)
        changed = {}
        for layer in kept:
            mixer = kept_attention(teacher.model.layers[layer].self_attn, config, "open", torch.Generator())
            if gates:
                mixer.load_state_dict(mixers[layer].state_dict(), assign=True)
            changed[layer] = mixer
        return changed

    teacher_NX = log_probs(teacher, sample)
    changes = {
        "gates": attention(rope=True, gates=True),
        "positions": attention(rope=settings.attention_rope, gates=False),
        "linear_layers": linear,
        "all": mixers,
    }
    losses = {}
    for name, change in changes.items():
        with swapped(teacher, change):
            losses[name] = divergence(teacher_NX, teacher, sample)
    return losses
