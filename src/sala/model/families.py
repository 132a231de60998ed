"""Source families: how a Llama, Mistral, Qwen2, Qwen3, MiniCPM or MiniCPM3 checkpoint is one of our network."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sala.errors import CheckpointError
from sala.model.checkpoint import (
    find_checkpoint,
    has_own_head,
    has_place,
    is_gguf,
    read_fields,
    read_generation,
    read_tensors,
    require_all,
    shapes_stored,
    stored_dtype,
)
from sala.model.config import LATENT_FIELDS, MiniCPMSALAConfig
from sala.model.decoder import MiniCPMSALAForCausalLM
from sala.model.fields import QUANTISATION, check_fields, say_once
from sala.model.gguf import GGUFFile
from sala.model.mixers import config_fields
from sala.model.packing import exchange, pack_all, packed_modules

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

# A name of `rope_theta` in some files.
ROPE_BASE = "rotary_emb_base"

# Fields that say where attention is windowed (`_refuse_windows`).
WINDOW_FIELDS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


@dataclass(frozen=True, slots=True)
class Family:
    """A family: its own fields, what its code decides, what its configuration leaves out.

    own: fields beyond the shared ones, by their name there, to ours.
    fixed: fields of ours that the family's code, not its configuration, decides.
    defaults: values of its configuration class for fields, by their name there, that a file lacks.
    derived: fields that its code computes from others and saves.
    mixer: the row of `MIXERS` that all its layers are.
    windows: how its code decides that layers read a sliding window: "always" when it has one, or where it is "switched" on.
    """

    own: dict[str, str]
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    derived: frozenset[str] = frozenset()
    mixer: str = "attention"
    windows: Literal["always", "switched"] = "switched"


_PLAIN = {"attn_use_rope": True, "attn_use_output_gate": False}
_MUP = ("scale_emb", "scale_depth", "dim_model_base")

# What every class below takes for a field that is absent; the shape of a Llama of 7B where the field is one of shape.
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}

FAMILIES = {
    "llama": Family(own={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}, fixed=_PLAIN, defaults=_LLAMA),
    "mistral": Family(
        own={},
        fixed=_PLAIN,
        defaults={
            **_LLAMA,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        windows="always",
    ),
    "qwen2": Family(own={}, fixed={**_PLAIN, "qkv_bias": True}, defaults=_QWEN),
    "qwen3": Family(
        own={"attention_bias": "attention_bias"},
        fixed={**_PLAIN, "attention_qk_norm": True},
        defaults={**_QWEN, "head_dim": 128},
    ),
    # not a class of transformers: configuration_minicpm.py of MiniCPM-2B and MiniCPM4-8B
    "minicpm": Family(
        own={name: name for name in ("attention_bias", *_MUP, "sparse_config")},
        fixed=_PLAIN,
        defaults={**_LLAMA, "tie_word_embeddings": True, "scale_emb": 1, "scale_depth": 1, "dim_model_base": 1},
    ),
    "minicpm3": Family(
        own={name: name for name in ("attention_bias", "mlp_bias", *_MUP, *LATENT_FIELDS)},
        fixed=_PLAIN,
        defaults={
            "vocab_size": 73448,
            "hidden_size": 2560,
            "intermediate_size": 6400,
            "num_hidden_layers": 62,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "max_position_embeddings": 32768,
            "initializer_range": 0.1,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": True,
            "q_lora_rank": 768,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
        },
        derived=frozenset({"head_dim", "qk_head_dim"}),  # head_dim: of a whole head, or of its rotated part, by version
        mixer="latent-attention",
    ),
}

NATIVE = "minicpm_sala"


# Files of MiniCPM's first generation name their class alone.
BY_ARCHITECTURE = {"MiniCPMForCausalLM": "minicpm", "MiniCPM3ForCausalLM": "minicpm3"}


def config_from(fields: Mapping[str, Any]) -> MiniCPMSALAConfig:
    """Return our configuration of a source's `config.json`; what the file lacks is what the family's own class takes for it.

    Raises:
        CheckpointError: the family is not supported, or the source uses something its family row does not know.
    """
    kind = fields.get("model_type") or BY_ARCHITECTURE.get(next(iter(fields.get("architectures") or ()), ""))
    if kind == NATIVE:
        return MiniCPMSALAConfig(**{k: v for k, v in fields.items() if k != "model_type"})
    if kind not in FAMILIES:
        raise CheckpointError(f"model_type {kind!r} is not supported; supported: {', '.join((*FAMILIES, NATIVE))}")
    family, what = FAMILIES[kind], f"a {kind} configuration"
    check_fields(fields, {*SHARED_FIELDS, *family.own, *family.derived, *WINDOW_FIELDS, ROPE_BASE, QUANTISATION}, what)
    there = {**family.defaults, **fields}
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        if not isinstance(there[name], int):
            raise CheckpointError(f"{name} is {there[name]!r} in {what}; expected a whole number")
    if there["num_attention_heads"] % (there.get("num_key_value_heads") or 1) and "num_key_value_heads" not in fields:
        # the class's number is for its own number of heads; here a model could not have it
        there["num_key_value_heads"] = None
    _refuse_windows(there, family, what)
    if (base := fields.get(ROPE_BASE)) not in (None, theta := fields.get("rope_theta", 10000)):
        raise CheckpointError(f"{ROPE_BASE} = {base} beside rope_theta = {theta} in {what}; expected one of them")
    ours = {name: there[name] for name in SHARED_FIELDS if name in there and name not in family.derived}
    ours |= {new: there[old] for old, new in family.own.items() if old in there}
    layers = there["num_hidden_layers"]
    # the muP numbers of a network without muP; a family that has its own keeps them
    neutral = {"scale_emb": 1, "scale_depth": math.sqrt(layers), "dim_model_base": there["hidden_size"]}
    return MiniCPMSALAConfig(
        **{**neutral, **ours, **family.fixed, "mixer_types": [family.mixer] * layers},
        dtype=fields.get("dtype") or fields.get("torch_dtype"),
        packing=fields.get(QUANTISATION),
    )


def _refuse_windows(fields: Mapping[str, Any], family: Family, what: str) -> None:
    """Refuse layers that would read the last tokens only, where a text can be longer than these."""
    window, longest = fields.get("sliding_window"), fields["max_position_embeddings"]
    layers: Sequence[str] = fields.get("layer_types") or ()
    if other := [layer for layer in layers if layer != "full_attention"]:
        raise CheckpointError(f"layer_types has {other[0]!r} in {what}; expected 'full_attention' in every layer")
    switched = bool(fields.get("use_sliding_window"))
    # a Qwen's first layers stay full
    windowed = not layers and fields.get("max_window_layers", 28) < fields["num_hidden_layers"]
    on = window is not None if family.windows == "always" else switched and window is not None and windowed
    if on and window < longest:
        raise CheckpointError(f"sliding_window = {window} in {what}; expected null, for full attention in every layer")


def load_config(name: str | Path, **changes: Any) -> MiniCPMSALAConfig:
    """Return our configuration of any supported checkpoint, with `changes` applied; of the hub, that file alone is read.

    Where weights are at hand they decide, as in transformers, what the file does not say or says otherwise: the dtype, and
    whether the head is the embedding.

    Raises:
        CheckpointError: see `config_from`.
    """
    place = find_checkpoint(name, ["config.json"])
    config = config_from(read_fields(place))
    if config.dtype is None:
        config.dtype = stored_dtype(place)
    if config.tie_word_embeddings and not is_gguf(place) and has_own_head(place):
        say_once(f"{place} has an lm_head.weight of its own, which is used; its config.json says tie_word_embeddings")
        config.tie_word_embeddings = False
    if not changes:
        return config
    return MiniCPMSALAConfig(**{**config_fields(config), **changes})


def load_model(
    name: str | Path,
    dtype: torch.dtype | Literal["stored"] | None = None,
    device: torch.device | str = "cpu",
    on_tensor: Callable[[str], None] = lambda name: None,
    keep_packed: bool = False,
    **changes: Any,
) -> MiniCPMSALAForCausalLM:
    """Return a checkpoint as our network, in evaluation mode.

    name: a folder, a GGUF file, a hub name, a model that ships with the package ("embedded-teacher", "embedded-hybrid"), or
        one that `sala fetch` brings.
    dtype: of the parameters; None means what the checkpoint's configuration says, or float32; "stored" leaves each tensor
        in its own (quantised ones, of a GGUF file, become bfloat16), and the configuration as it is. On the CPU what is not
        converted is mapped from its file, and not read before it is used.
    device: where the parameters go, one after the other: of another device's the CPU's memory never holds more than one.
    on_tensor: called with each tensor's name as it is read, for a progress display.
    keep_packed: run matrices of a GGUF file in the 4 or 8 bits that they are stored in, where their kind allows it; such a
        model cannot be saved. Folders in GPTQ's format always run so.
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
    packed = {f"{name}.{part}" for name, module in packed_modules(model) for part in module._buffers}
    stored = dict(GGUFFile(folder).packed()) if keep_packed and is_gguf(folder) else {}
    for key, weight in stored.items():
        has_place(key, (weight.N, weight.K), shapes, folder)
        on_tensor(key)
    for key, tensor in read_tensors(folder, stored):
        if has_place(key, tensor.shape, shapes, folder):
            state[key] = tensor.to(device, None if dtype == "stored" or key in packed else dtype)
            on_tensor(key)
    require_all({*state, *stored}, shapes, folder)
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    pack_all(model, folder)
    exchange(model, stored)
    if dtype != "stored":
        model.config.dtype = dtype
    model.generation_config = read_generation(folder, config)
    return model.eval()
