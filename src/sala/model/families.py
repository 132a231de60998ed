"""Source families: how a Llama, Qwen2, Qwen3, MiniCPM or MiniCPM3 checkpoint is one of our network."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sala.errors import CheckpointError, nearest
from sala.model.checkpoint import (
    find_checkpoint,
    has_place,
    is_gguf,
    read_fields,
    read_generation,
    read_tensors,
    require_all,
    shapes_stored,
)
from sala.model.config import LATENT_FIELDS, MiniCPMSALAConfig
from sala.model.decoder import MiniCPMSALAForCausalLM
from sala.model.mixers import config_fields

# Fields that mean the same under the same name in every family.
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)

# Fields of the sources that change nothing in the forward pass, or say what our classes do anyway.
IGNORED_FIELDS = frozenset(
    {
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "torch_dtype",
        "id2label",
        "label2id",
        "layer_types",
        "max_window_layers",
        "model_type",
        "mup_denominator",
        "pretraining_tp",
        "sliding_window",
        "transformers_version",
        "use_sliding_window",
        "_name_or_path",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "problem_type",
        "_attn_implementation_autoset",
        "is_llama_config",
        "rope_interleaved",
    }
)


@dataclass(frozen=True, slots=True)
class Family:
    """A family: its own fields, what its code decides, what its configuration leaves out.

    own: fields beyond the shared ones, by their name there, to ours.
    fixed: fields of ours that the family's code, not its configuration, decides.
    defaults: values its code takes for shared fields that a configuration lacks, where ours differ.
    derived: fields that its code computes from others and saves.
    mixer: the row of `MIXERS` that all its layers are.
    """

    own: dict[str, str]
    fixed: dict[str, Any]
    defaults: dict[str, Any] = field(default_factory=dict)
    derived: frozenset[str] = frozenset()
    mixer: str = "attention"


_PLAIN = {"attn_use_rope": True, "attn_use_output_gate": False}
_MUP = ("scale_emb", "scale_depth", "dim_model_base")

FAMILIES = {
    "llama": Family(own={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}, fixed=_PLAIN),
    "qwen2": Family(own={}, fixed={**_PLAIN, "qkv_bias": True}),
    "qwen3": Family(
        own={"attention_bias": "attention_bias"},
        fixed={**_PLAIN, "attention_qk_norm": True},
        defaults={"head_dim": 128},
    ),
    "minicpm": Family(
        own={name: name for name in ("attention_bias", *_MUP, "sparse_config")},
        fixed=_PLAIN,
    ),
    "minicpm3": Family(
        own={name: name for name in ("attention_bias", "mlp_bias", *_MUP, *LATENT_FIELDS)},
        fixed=_PLAIN,
        defaults={"tie_word_embeddings": True},  # the released configuration does not say so
        derived=frozenset({"head_dim", "qk_head_dim"}),  # head_dim: of a whole head, or of its rotated part, by version
        mixer="latent-attention",
    ),
}

NATIVE = "minicpm_sala"


def config_from(fields: dict[str, Any]) -> MiniCPMSALAConfig:
    """Return our configuration of a source's `config.json`.

    Raises:
        CheckpointError: the family is not supported, or the source uses something its family row does not know.
    """
    kind = fields.get("model_type")
    if kind == NATIVE:
        return MiniCPMSALAConfig(**{k: v for k, v in fields.items() if k != "model_type"})
    if kind not in FAMILIES:
        raise CheckpointError(f"model_type {kind!r} is not supported; supported: {', '.join((*FAMILIES, NATIVE))}")
    family = FAMILIES[kind]
    if fields.get("use_sliding_window"):
        raise CheckpointError(
            f"use_sliding_window = True in a {kind} checkpoint; right would be full attention in every layer"
        )
    known = {*SHARED_FIELDS, *family.own}
    for name in fields:
        if name not in known | IGNORED_FIELDS | family.derived:
            raise CheckpointError(
                f"unknown field {name!r} = {fields[name]!r} in a {kind} configuration{nearest(name, known)}"
            )
    ours = {name: fields[name] for name in SHARED_FIELDS if name in fields and name not in family.derived}
    ours["dtype"] = fields.get("dtype", fields.get("torch_dtype"))
    ours |= {new: fields[old] for old, new in family.own.items() if old in fields}
    layers, width = (_required(fields, name, kind) for name in ("num_hidden_layers", "hidden_size"))
    # the muP numbers of a network without muP; a family that has its own keeps them
    neutral = {"scale_emb": 1, "scale_depth": math.sqrt(layers), "dim_model_base": width}
    return MiniCPMSALAConfig(
        **{**neutral, **family.defaults, **ours, **family.fixed, "mixer_types": [family.mixer] * layers}
    )


def _required(fields: Mapping[str, Any], name: str, kind: str) -> int:
    if not isinstance(value := fields.get(name), int):
        raise CheckpointError(f"{name} is {value!r} in a {kind} configuration; right would be a whole number")
    return value


def load_config(name: str | Path, **changes: Any) -> MiniCPMSALAConfig:
    """Return our configuration of any supported checkpoint, with `changes` applied; of the hub, that file alone is read."""
    config = config_from(read_fields(find_checkpoint(name, ["config.json"])))
    if not changes:
        return config
    return MiniCPMSALAConfig(**{**config_fields(config), **changes})


def load_model(
    name: str | Path,
    dtype: torch.dtype | Literal["stored"] | None = None,
    device: torch.device | str = "cpu",
    on_tensor: Callable[[str], None] = lambda name: None,
    **changes: Any,
) -> MiniCPMSALAForCausalLM:
    """Return a checkpoint as our network, in evaluation mode.

    name: a folder, a GGUF file, a hub name, a model that ships with the package ("embedded-teacher", "embedded-hybrid"), or
        one that `sala fetch` brings.
    dtype: of the parameters; None means what the checkpoint's configuration says, or float32; "stored" leaves each tensor
        in its own (quantised ones, of a GGUF file, become bfloat16). On the CPU what is not converted is mapped from its
        file, and not read before it is used.
    device: where the parameters go, one after the other: of another device's the CPU's memory never holds more than one.
    on_tensor: called with each tensor's name as it is read, for a progress display.
    changes: fields of the configuration to override.

    Raises:
        CheckpointError: files are missing or truncated, the family is not supported, or tensors do not fit the configuration.
    """
    folder = find_checkpoint(name)
    config = load_config(folder, **changes)
    if dtype is None or (dtype == "stored" and is_gguf(folder)):
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM(config)
    shapes, state = shapes_stored(model), {}
    for key, tensor in read_tensors(folder):
        if has_place(key, tensor.shape, shapes, folder):
            state[key] = tensor.to(device, None if dtype == "stored" else dtype)
            on_tensor(key)
    require_all(state, shapes, folder)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    model.config.dtype = model.dtype if dtype == "stored" else dtype
    model.generation_config = read_generation(folder, config)
    return model.eval()
