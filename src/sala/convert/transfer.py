"""Weights of an attention layer as those of a linear layer, and of a teacher as those of a hybrid.

What is made here stands on the tensors it was made from wherever their numbers are the same; `own` takes it off them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from sala.convert.latent import plain_projections
from sala.errors import ConfigError
from sala.model import MIXERS, MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.model.kinds import LIGHTNING, SPARSE_ROWS
from sala.model.latent import LatentAttention
from sala.model.mixers import config_fields

Module = TypeVar("Module", bound=nn.Module)

GateInit = Literal["random", "open"]
# sigmoid(0): what a gate with zero weights multiplies with
ZERO_GATE = 0.5


def unshare(module: Module) -> Module:
    """Give a module parameters of its own, which can be trained and leave all others as they are; return it."""
    for parameter in module.parameters():
        parameter.data = parameter.detach().clone()
    return module


def expand_heads(tensor: Tensor, num_kv_heads: int, num_heads: int) -> Tensor:
    """Repeat key/value heads so that every query head has its own copy of the one it reads.

    Args:
        tensor: (G * K, ...), a projection's weight or bias. Returns (H * K, ...): head h is head h // (H / G).

    Repetition is by heads, not by rows, which would scramble heads whenever H > G. Source: HALO section 4.1.
    """
    heads = tensor.unflatten(0, (num_kv_heads, -1))
    return heads.repeat_interleave(num_heads // num_kv_heads, dim=0).flatten(0, 1)


def require_teacher(config: MiniCPMSALAConfig) -> None:
    """Raise ConfigError unless every layer is full softmax attention without a gate: a hybrid is no teacher."""
    other = sorted({kind for kind in config.mixer_types or () if kind not in SPARSE_ROWS})
    if other:
        raise ConfigError(
            f"the teacher has {', '.join(other)} layers; a conversion starts from 'attention' in every layer"
        )
    if config.attn_use_output_gate:
        # the gates that a conversion adds would take the place of those that the teacher was trained with
        raise ConfigError(
            "the teacher has output gates (attn_use_output_gate = true), as a converted model has; expected a model "
            "without, such as a Llama, Qwen or MiniCPM"
        )


def hybrid_config(
    teacher: MiniCPMSALAConfig, mixer_types: Sequence[str], *, rope: bool, gates: bool, **changes: Any
) -> MiniCPMSALAConfig:
    """Return the teacher's configuration with other mixers: rotary positions, norms and gates on linear layers.

    Args:
        rope, gates: rotary positions and output gates on the layers that stay attention.
        changes: further fields of the configuration.
    """
    fields = config_fields(teacher) | {
        "mixer_types": list(mixer_types),
        "attn_use_rope": rope,
        "attn_use_output_gate": gates,
        "lightning_nh": teacher.num_attention_heads,
        "lightning_nkv": teacher.num_attention_heads,
        "lightning_head_dim": teacher.head_dim,
        "lightning_scale": "1/sqrt(d)",
        "lightning_use_rope": True,
        "qk_norm": True,
        "use_output_gate": True,
        "use_output_norm": True,
    }
    return MiniCPMSALAConfig(**(fields | changes))


def _gate_weight(shape: torch.Size, gate_init: GateInit, generator: torch.Generator) -> Tensor:
    if gate_init == "open":
        return torch.zeros(shape)
    # torch's default for a Linear, as HALO builds its layers; drawn on the CPU, the same for every device
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _projections(
    weights: Mapping[str, Tensor], gate: str, shape: torch.Size, gate_init: GateInit, generator: torch.Generator
) -> dict[str, Tensor]:
    """The projections among a layer's weights, and a new gate."""
    state = {name: tensor for name, tensor in weights.items() if "_proj." in name}
    state[gate] = _gate_weight(shape, gate_init, generator)
    if gate_init == "open":
        # sigmoid(0) halves what the gate lets through; the projection behind it gives it back exactly
        state["o_proj.weight"] = state["o_proj.weight"] / ZERO_GATE
    return state


def _unfilled(kind: Any, config: MiniCPMSALAConfig) -> Any:
    # no weights are drawn that are replaced at once: it would take time, and numbers from torch's own generator
    with torch.device("meta"):
        return kind(config)


def _filled(module: Any, state: Mapping[str, Tensor], like: Tensor) -> Any:
    """Give `module`, made without weights, the tensors of `state` with the device and the dtype of `like`."""
    module.load_state_dict({name: tensor.to(like) for name, tensor in state.items()}, assign=True)
    return module


def linear_twin(
    attention: Any, config: MiniCPMSALAConfig, gate_init: GateInit, generator: torch.Generator
) -> nn.Module:
    """Return a linear attention layer with the weights of `attention`, a layer of a teacher.

    Args:
        config: a hybrid's configuration (see `hybrid_config`) that has the teacher's shapes.

    Queries, keys, values and output are the teacher's, key/value heads one a query head; q and k norms its own or 1; the
    output norm is 1; the gate is new. Biases are there where the teacher has them. Source: HALO section 4.1.
    Latent attention is multiplied out first, see `plain_projections`.
    """
    twin = _unfilled(MIXERS[LIGHTNING].module, config)
    empty = twin.state_dict()
    weights = plain_projections(attention) if isinstance(attention, LatentAttention) else attention.state_dict()
    state = _projections(weights, "z_proj.weight", empty["z_proj.weight"].shape, gate_init, generator)
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        if name in state:
            state[name] = expand_heads(state[name], attention.num_groups, attention.num_heads)
    for name in ("q_norm.weight", "k_norm.weight"):
        state[name] = weights[name] if name in weights else torch.ones(empty[name].shape)
    state["o_norm.weight"] = torch.ones(empty["o_norm.weight"].shape)
    return _filled(twin, state, attention.o_proj.weight)


def kept_attention(
    attention: Any, config: MiniCPMSALAConfig, gate_init: GateInit, generator: torch.Generator
) -> nn.Module:
    """Return an attention layer with the weights of `attention`, positions and gate as `config` says."""
    kept = _unfilled(type(attention), config)
    state = dict(attention.state_dict())
    empty = kept.state_dict()
    if "o_gate.weight" in empty:
        shape = empty["o_gate.weight"].shape
        state |= _projections(attention.state_dict(), "o_gate.weight", shape, gate_init, generator)
    return _filled(kept, state, attention.o_proj.weight)


def assemble(teacher: MiniCPMSALAForCausalLM, config: MiniCPMSALAConfig, mixers: Mapping[int, nn.Module]) -> Any:
    """Return a hybrid of `config`: the given mixers, the rest the teacher's; heads are tied only as there."""
    hybrid = _unfilled(MiniCPMSALAForCausalLM, config)
    state = {name: tensor for name, tensor in teacher.state_dict().items() if ".self_attn." not in name}
    for layer, mixer in mixers.items():
        own = mixer.state_dict().items()
        state |= {f"model.layers.{layer}.self_attn.{name}": tensor for name, tensor in own}
    _filled(hybrid, state, teacher.lm_head.weight)
    hybrid.tie_weights()
    return hybrid.eval()
