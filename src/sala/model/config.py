"""The configuration of the one network: every field of the released `config.json`, and the switches of its source families."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from transformers import PreTrainedConfig

from sala.errors import ConfigError, nearest
from sala.model.fields import COMMON, ONE_VALUE, QUANTISATION, check_fields, check_rope
from sala.model.interface import CACHE
from sala.model.kinds import KINDS, LATENT_ROWS, MIXER_ALIASES, runs
from sala.model.packing import Packing
from sala.ops.infllm import SparseGeometry

# Fields of multi-head latent attention, by their names in a MiniCPM3 configuration.
LATENT_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

# Numbers that mean something only above zero.
ABOVE_ZERO = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "lightning_nh",
    "lightning_nkv",
    "lightning_head_dim",
    *LATENT_FIELDS,
    "dim_model_base",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)

# Taken by the base class of transformers, which keeps some of them.
INHERITED_FIELDS = frozenset(
    {
        "torch_dtype",
        "num_labels",
        "name_or_path",
        "attn_implementation",
        "output_attentions",
        "experts_implementation",
        "_commit_hash",
    }
)

# Attributes that a user or a tool has set on a configuration, by name: kept in the file beside ours, and taken back from it.
USER_FIELDS = "user_fields"

# What a saved folder has for programs that do not import `sala`: transformers runs it with trust_remote_code=True.
REMOTE_CODE = "modeling_sala.py"
REMOTE_CODE_TEXT = """# The code of this model is the package `sala`. transformers reads this file with trust_remote_code=True.
from sala import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, MiniCPMSALAModel

__all__ = ["MiniCPMSALAConfig", "MiniCPMSALAForCausalLM", "MiniCPMSALAModel"]
"""
AUTO_MAP = {
    "AutoConfig": "modeling_sala.MiniCPMSALAConfig",
    "AutoModel": "modeling_sala.MiniCPMSALAModel",
    "AutoModelForCausalLM": "modeling_sala.MiniCPMSALAForCausalLM",
}

DTYPES = ("float32", "bfloat16", "float16", "float64")

LIGHTNING_SCALES = {"1/sqrt(d)": lambda width: width**-0.5, "1/d": lambda width: 1.0 / width, "1": lambda width: 1.0}


class MiniCPMSALAConfig(PreTrainedConfig):
    """Fields, defaults and meaning follow the released MiniCPM-SALA checkpoint.

    Ours on top of it: `attention_qk_norm` (Qwen3 normalises q and k on attention layers too), `qkv_bias` (Qwen2),
    `mlp_bias` (Llama), `attn_logits_scaling` (base `a` of HypeNet's log_a(t + a), HALO paper section 4.3),
    `normalizer` and `dense_rule` inside `sparse_config`, and the five of multi-head latent attention (MiniCPM3), None
    elsewhere. With these a head is [qk_nope_head_dim | qk_rope_head_dim] wide, of which every layer that rotates turns
    the second part only, and `v_head_dim` is the value width of linear layers too.

    Raises:
        ConfigError: a field is unknown, or its value cannot be built from; the message names both.
    """

    model_type = "minicpm_sala"
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012 - Trainer adds a list to it

    vocab_size: int = 73448
    hidden_size: int = 4096
    intermediate_size: int = 16384
    hidden_act: str = "silu"
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    qkv_bias: bool = False
    mlp_bias: bool = False
    attention_qk_norm: bool = False
    attn_use_rope: bool = False
    attn_use_output_gate: bool = True
    attn_logits_scaling: float | int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    lightning_nh: int | None = None
    lightning_nkv: int | None = None
    lightning_head_dim: int | None = None
    lightning_scale: str = "1/sqrt(d)"
    lightning_use_rope: bool = True
    lightning_layerwise_decay: bool = False
    qk_norm: bool = True
    use_output_gate: bool = True
    use_output_norm: bool = True
    mixer_types: list[str] | tuple[str, ...] = ()
    # how weights are packed (`model/packing.py`): `quantization_config` in files, a name under which transformers would take
    # the loading over
    packing: dict[str, Any] | None = None
    sparse_config: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float | int = 10000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 524288
    scale_emb: float | int = 1
    scale_depth: float | int | None = None
    dim_model_base: float | int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **fields: Any) -> None:
        self.packing = fields.pop(QUANTISATION, None) or self.packing
        if self.packing is not None:
            Packing.read(self.packing)
        self._refuse_unknown(fields)
        self._accept_rope_parameters(fields)
        self._accept_dtype(fields)
        self._refuse_other_types()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if any(getattr(self, name) is not None for name in LATENT_FIELDS):
            self._resolve_latent()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.lightning_nh is None:
            self.lightning_nh = self.num_attention_heads
        if self.lightning_nkv is None:
            # the fallback of the released configuration class, though it reads oddly
            self.lightning_nkv = self.num_key_value_heads
        if self.lightning_head_dim is None:
            self.lightning_head_dim = self.head_dim
        if self.scale_depth is None:
            self.scale_depth = math.sqrt(self.num_hidden_layers)
        if self.dim_model_base is None:
            self.dim_model_base = self.hidden_size
        if not self.mixer_types:
            self.mixer_types = ["attention"] * self.num_hidden_layers
        self.mixer_types = [_canonical_mixer(name) for name in self.mixer_types]
        self._validate(fields.get("layer_types"))
        super().__post_init__(**self._for_base(fields))

    @property
    def layer_types(self) -> list[str]:
        """What transformers calls the layers, so that its tools know which of them keep keys and values."""
        return [
            "linear_attention" if KINDS[name].operator == "lightning" else "full_attention" for name in self.mixer_types
        ]

    @property
    def residual_scale(self) -> float:
        """Factor on the branch, not on the residual: scale_depth / sqrt(layers)."""
        assert self.scale_depth is not None
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def lightning_scale_value(self) -> float:
        return LIGHTNING_SCALES[self.lightning_scale](self.lightning_head_dim)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would copy this module into saved folders, which have `REMOTE_CODE` instead."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json, and beside it the module that lets transformers load the folder where nobody imports `sala`."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        (Path(save_directory) / REMOTE_CODE).write_text(REMOTE_CODE_TEXT, encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """As the base class has it, with `auto_map` and the names of what a user has set, and without latents that are None."""
        fields = {k: v for k, v in super().to_dict().items() if k not in LATENT_FIELDS or v is not None}
        fields["auto_map"] = dict(AUTO_MAP)
        if packing := fields.pop("packing"):
            fields[QUANTISATION] = packing
        ours = {*self.__dataclass_fields__, *INHERITED_FIELDS, *COMMON}
        of_user = _of_user(name for name in self.__dict__ if name in fields and name not in ours)
        return {**fields, USER_FIELDS: sorted(of_user)} if of_user else fields

    @property
    def sparse_geometry(self) -> SparseGeometry:
        """The numbers of InfLLM-V2; a configuration without `sparse_config` never selects."""
        if self.sparse_config is None:
            raise ConfigError(
                "sparse_config is None, but a block-sparse mixer needs one; expected the released numbers"
            )
        return SparseGeometry(**{k: v for k, v in self.sparse_config.items() if k != "use_nope"})

    def _refuse_unknown(self, fields: dict[str, Any]) -> None:
        of_user = _of_user(fields.get(USER_FIELDS) or ())
        known = {*self.__dataclass_fields__, *INHERITED_FIELDS, USER_FIELDS, "rope_parameters", "layer_types"}
        theirs = {name: value for name, value in fields.items() if name not in of_user}
        check_fields(theirs, known, "the model configuration", ConfigError)

    def _for_base(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields that the base class takes or keeps; of the others that passed none has a meaning."""
        kept = INHERITED_FIELDS | _of_user(fields.get(USER_FIELDS) or ())
        return {name: value for name, value in fields.items() if name in kept}

    def _refuse_other_types(self) -> None:
        for name, hint in MiniCPMSALAConfig.__annotations__.items():
            value, kinds = getattr(self, name), [get_origin(kind) or kind for kind in get_args(hint) or (hint,)]
            if not _is_one_of(value, kinds):
                raise ConfigError(f"{name} = {value!r}; expected {' or '.join(kind.__name__ for kind in kinds)}")
            if name in ABOVE_ZERO and value is not None and not value > 0:
                raise ConfigError(f"{name} = {value}; expected a number above 0")

    def _accept_dtype(self, fields: dict[str, Any]) -> None:
        dtype = self.dtype or fields.pop("torch_dtype", None)
        name = str(dtype).removeprefix("torch.")
        if dtype is not None and name not in DTYPES:
            raise ConfigError(f"dtype = {dtype!r}; expected one of {', '.join(DTYPES)}")
        self.dtype = None if dtype is None else name

    def _accept_rope_parameters(self, fields: dict[str, Any]) -> None:
        # the layout transformers 5 writes: both values in one dictionary
        parameters = fields.pop("rope_parameters", None) or self.rope_scaling
        if not isinstance(parameters, dict):
            return
        check_rope(parameters, "rope_scaling", ConfigError)
        scaling = {name: value for name, value in parameters.items() if name != "partial_rotary_factor"}
        self.rope_theta = scaling.pop("rope_theta", self.rope_theta)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        self.rope_scaling = None if kind == "default" else scaling

    def _validate(self, layer_types: Sequence[str] | None) -> None:
        layers, mixers = self.num_hidden_layers, self.mixer_types
        if len(mixers) != layers:
            raise ConfigError(
                f"mixer_types has {len(mixers)} entries, num_hidden_layers is {layers}; expected one a layer"
            )
        if layer_types and list(layer_types) != self.layer_types:
            raise ConfigError(
                f"layer_types = {layer_types} contradict mixer_types; expected {self.layer_types}, or null"
            )
        for heads, groups in (("num_attention_heads", "num_key_value_heads"), ("lightning_nh", "lightning_nkv")):
            count, group = getattr(self, heads), getattr(self, groups)
            if count % group:
                raise ConfigError(f"{heads} = {count} is not a multiple of {groups} = {group}")
        if not self.initializer_range >= 0:
            raise ConfigError(f"initializer_range = {self.initializer_range}; expected 0 or more")
        if self.lightning_scale not in LIGHTNING_SCALES:
            raise ConfigError(
                f"lightning_scale = {self.lightning_scale!r}; expected one of {', '.join(LIGHTNING_SCALES)}"
            )
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act = {self.hidden_act!r} is not supported; expected 'silu'")
        if self.attention_dropout:
            raise ConfigError(f"attention_dropout = {self.attention_dropout} is not supported; expected 0.0")
        if self.lightning_layerwise_decay:
            raise ConfigError("lightning_layerwise_decay = True is another model's decay; expected False")
        if self.attn_logits_scaling is not None and self.attn_logits_scaling <= 1:
            raise ConfigError(f"attn_logits_scaling = {self.attn_logits_scaling}; expected a base above 1, or null")
        for name in mixers:
            kind = KINDS[name]
            if kind.operator != "lightning" and kind.latent != (self.kv_lora_rank is not None):
                raise ConfigError(
                    f"mixer type {name!r} with kv_lora_rank = {self.kv_lora_rank}; "
                    f"expected {', '.join(LATENT_ROWS)} with the latent fields, and no others"
                )
        if runs(mixers, "infllm"):
            self._validate_sparse()

    def _resolve_latent(self) -> None:
        """Fill in and check what multi-head latent attention needs."""
        missing = [name for name in LATENT_FIELDS[:-1] if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"{missing[0]} is None; expected a width, or null in all of {LATENT_FIELDS}")
        assert self.qk_nope_head_dim is not None and self.qk_rope_head_dim is not None
        rotated, width = self.qk_rope_head_dim, self.qk_nope_head_dim + self.qk_rope_head_dim
        if self.v_head_dim is None:
            self.v_head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = width
        mscale = (self.rope_scaling or {}).get("mscale_all_dim")
        heads = self.num_attention_heads
        for name, fits, right in (
            ("qk_rope_head_dim", rotated > 0 and rotated % 2 == 0, "an even width, for pairs rotate"),
            ("lightning_head_dim", (self.lightning_head_dim or width) >= rotated, f"at least the rotated {rotated}"),
            ("head_dim", self.head_dim == width, f"qk_nope_head_dim + qk_rope_head_dim = {width}"),
            ("v_head_dim", self.v_head_dim <= width, f"at most the width of keys, {width}"),
            ("num_key_value_heads", self.num_key_value_heads == heads, f"num_attention_heads = {heads}"),
            ("attention_qk_norm", not self.attention_qk_norm, "False, for latents have norms of their own"),
            ("qkv_bias", not self.qkv_bias, "attention_bias, the biases of the projections to latents"),
            ("rope_scaling", not mscale, f"one without mscale_all_dim (here {mscale}), which scales scores"),
        ):
            if not fits:
                raise ConfigError(f"{name} = {getattr(self, name)} with latent attention; expected {right}")

    def _validate_sparse(self) -> None:
        sparse = self.sparse_config or {}
        known = {*SparseGeometry.__dataclass_fields__, "use_nope"}
        for name, value in sparse.items():
            if name not in known:
                raise ConfigError(f"unknown field {name!r} = {value!r} in sparse_config{nearest(name, known)}")
        if sparse.get("use_nope"):
            raise ConfigError("sparse_config.use_nope = True is not supported; expected False (the released value)")
        _ = self.sparse_geometry


def _of_user(names: Iterable[str]) -> frozenset[str]:
    """Return the names that may be a user's: not those that say how weights are stored or what a network does."""
    return frozenset(name for name in names if name not in ONE_VALUE and not name.startswith("_")) - {QUANTISATION}


def _is_one_of(value: Any, kinds: Sequence[type]) -> bool:
    if isinstance(value, bool):  # which is an int for Python alone
        return bool in kinds
    # JSON may write 1.0 as 1
    return isinstance(value, tuple(kinds)) or (float in kinds and isinstance(value, int))


def _canonical_mixer(name: str) -> str:
    if name not in MIXER_ALIASES:
        raise ConfigError(
            f"mixer type {name!r} is not known{nearest(name, MIXER_ALIASES)}; known: {', '.join(sorted(set(MIXER_ALIASES.values())))}"
        )
    return MIXER_ALIASES[name]
