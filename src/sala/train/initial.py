"""The random weights that a model from scratch starts with."""

import torch
from torch import nn

from sala.errors import RecipeError
from sala.model import MiniCPMSALAForCausalLM
from sala.recipe import Init

# a lag head looks through its fastest rotations; the slow ones cannot tell neighbours apart
LAG_PAIRS = 12
LAG_STRENGTH = 6.0


def require_init(model: MiniCPMSALAForCausalLM, init: Init) -> None:
    """Raise RecipeError when biases or lag heads are asked of a model without them, or without rotary positions."""
    if not (init.qk_bias_std or init.lags):
        return
    attention = model.model.layers[0].self_attn
    if attention.q_proj.bias is None:
        raise RecipeError("init: qk_bias_std and lags need query and key biases; expected model.qkv_bias: true")
    if len(init.lags) > attention.num_heads:
        raise RecipeError(
            f"init.lags asks for {len(init.lags)} heads; expected at most the {attention.num_heads} of a layer"
        )
    if init.lags and model.model.rope is None:
        raise RecipeError("init.lags are rotations of biases; expected model.attn_use_rope: true")


@torch.no_grad()
def initialize(model: MiniCPMSALAForCausalLM, init: Init) -> None:
    """Set the weights of `model` as `init` says, from torch's global random numbers.

    Raises:
        RecipeError: see `require_init`.
    """
    require_init(model, init)
    for name, parameter in model.model.layers.named_parameters():
        if init.matrices == "fan_in" and parameter.ndim == 2:
            ends_branch = name.split(".")[-2] in ("o_proj", "down_proj")
            nn.init.normal_(parameter, std=0.0 if ends_branch else parameter.shape[1] ** -0.5)
        if init.qk_bias_std and name.endswith(("q_proj.bias", "k_proj.bias")):
            nn.init.normal_(parameter, std=init.qk_bias_std)
    if init.lags:
        _seed_lags(model, init.lags)


def _seed_lags(model: MiniCPMSALAForCausalLM, lags: tuple[int, ...]) -> None:
    """Turn biases of the first layer's heads so that head h looks `lags[h]` tokens back.

    A constant key turns with its own position and a constant query with its own: their product depends on the distance
    alone, and is largest where the query's bias is the key's, turned back by the lag.
    """
    attention = model.model.layers[0].self_attn
    assert model.model.rope is not None
    frequencies = torch.tensor(model.model.rope[0])
    half = len(frequencies)
    size = torch.where(torch.arange(half) < LAG_PAIRS, LAG_STRENGTH, 0.0)
    keys_GK = attention.k_proj.bias.view(attention.num_groups, 2 * half)
    keys_GK[:, :half], keys_GK[:, half:] = size, 0.0
    queries_HK = attention.q_proj.bias.view(attention.num_heads, 2 * half)
    for head, lag in enumerate(lags):
        queries_HK[head, :half] = size * torch.cos(lag * frequencies)
        queries_HK[head, half:] = -size * torch.sin(lag * frequencies)
