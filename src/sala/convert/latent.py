"""Multi-head latent attention multiplied out: the plain projections of the linear layer that replaces it."""

import torch
from torch import Tensor, nn

from sala.model.latent import LatentAttention
from sala.model.norm import RMSNorm


def plain_projections(attention: LatentAttention) -> dict[str, Tensor]:
    """Return q_proj, k_proj, v_proj (a head of each a query head) and o_proj of a latent layer, as their state.

    Each pair of projections becomes its product, W_b diag(w) W_a with w the weight of the norm between them. What that
    norm divides by, the size of the token's latent, is no linear map; the size of the latent of an input of white noise
    stands in for it, one number a layer. The difference from token to token is dropped:

    - in queries without a trace, for the linear layer's q norm divides by the size of every query;
    - in values, so a token's weight in the state is off by its latent's size: alignment has to learn that;
    - in the keys' own part but not in their rotated part, which has no norm. The linear layer's k norm cancels what is
      off in both together, not their ratio: alignment has to learn that too.

    Values keep their own width (`v_head_dim`), so nothing is padded and the output projection is the teacher's.
    """
    heads, dtype = attention.num_heads, attention.o_proj.weight.dtype
    q = _through_norm(attention.q_b_proj, attention.q_a_layernorm, _matrix(attention.q_a_proj))
    latent, shared = _matrix(attention.kv_a_proj_with_mqa).split((attention.latent_width, attention.rotary_width))
    expanded = _through_norm(attention.kv_b_proj, attention.kv_a_layernorm, latent).unflatten(0, (heads, -1))
    own, v = expanded.split((attention.own_width, attention.value_width), dim=1)
    k = torch.cat((own, shared.expand(heads, -1, -1)), dim=1)
    state = {f"o_proj.{name}": tensor for name, tensor in attention.o_proj.state_dict().items()}
    for name, matrix in (("q_proj", q), ("k_proj", k.flatten(0, 1)), ("v_proj", v.flatten(0, 1))):
        width = attention.o_proj.out_features
        state[f"{name}.weight"] = matrix[:, :width].to(dtype)
        if matrix.shape[1] > width:
            state[f"{name}.bias"] = matrix[:, width].to(dtype)
    return state


def _matrix(linear: nn.Linear) -> Tensor:
    """Return the weight in float32, with the bias, if any, as its last column."""
    weight = linear.weight.detach().float()
    return weight if linear.bias is None else torch.cat((weight, linear.bias.detach().float()[:, None]), dim=1)


def _through_norm(outer: nn.Linear, norm: RMSNorm, inner_RD: Tensor) -> Tensor:
    # the mean square of the R entries of W x + b is |[W b]|^2 / R when x is white
    size = (inner_RD.square().sum() / len(inner_RD) + norm.eps).sqrt()
    return _matrix(outer) @ (norm.weight.detach().float()[:, None] * inner_RD) / size
