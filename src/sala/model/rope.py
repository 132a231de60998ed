"""Rotary position embedding: half-split pairs, tables in float32, with the scalings the source families use."""

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sala.errors import ConfigError
from sala.model.config import MiniCPMSALAConfig
from sala.model.kinds import LIGHTNING
from sala.ops.constants import constant

# `dynamic` is left out: its frequencies change with the length, which no cache of rotated keys survives.
SCALINGS = ("linear", "llama3", "yarn", "longrope")


def inverse_frequencies(config: MiniCPMSALAConfig, width: int) -> tuple[tuple[float, ...], float]:
    """Return (R = width / 2 inverse frequencies, factor on cosine and sine).

    Plain numbers, not a buffer: a checkpoint is loaded through the meta device, where buffers come out empty.

    Raises:
        ConfigError: the width is odd, or `rope_scaling` names a kind that is not supported.
    """
    if width % 2:
        raise ConfigError(f"heads of width {width} cannot turn, pair by pair; expected an even head_dim")
    if config.rope_scaling is None:
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
        return tuple((1.0 / config.rope_theta**exponents).tolist()), 1.0
    kind = config.rope_scaling.get("rope_type", config.rope_scaling.get("type"))
    if kind not in SCALINGS:
        raise ConfigError(f"rope_scaling of type {kind!r} is not supported; supported: {', '.join(SCALINGS)}, or null")
    if kind == "longrope" and config.rope_scaling["long_factor"] != config.rope_scaling["short_factor"]:
        raise ConfigError(
            "rope_scaling of type 'longrope' with a long_factor of its own changes keys already cached when a text grows past "
            "the original length; expected the same list as short_factor"
        )
    donor = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=width,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={**config.rope_scaling, "rope_type": kind, "rope_theta": config.rope_theta},
    )
    with torch.device("cpu"):  # also when the model is being laid out on the meta device
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](donor)
    return tuple(frequencies.tolist()), float(factor)


# scalings whose `max_position_embeddings` may be that of before the stretch
STRETCHED = ("linear", "yarn")


def trained_length(config: MiniCPMSALAConfig) -> int | None:
    """Return how many positions the softmax layers of a model know; None where none of them rotates.

    Layers without rotation, as in a hybrid of HALO, have no last position, and linear layers forget before theirs. A scaling
    of rotations stretches the positions by its factor.
    """
    if not config.attn_use_rope or set(config.mixer_types) == {LIGHTNING}:
        return None
    length, scaling = config.max_position_embeddings, config.rope_scaling or {}
    if scaling.get("rope_type", scaling.get("type")) not in STRETCHED:
        return length
    original = scaling.get("original_max_position_embeddings") or length
    return max(length, int(original * scaling["factor"]))


def rotation_tables(positions_BT: Tensor, frequencies: tuple[float, ...], factor: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each (B, T, R) float32 for R pairs. Padding (position -1) rotates too; nobody reads it."""
    angles = positions_BT[..., None] * constant(frequencies, positions_BT.device)
    cosine, sine = angles.cos(), angles.sin()
    return (cosine, sine) if factor == 1 else (cosine * factor, sine * factor)
