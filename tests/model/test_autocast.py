"""Autocast rounds matrix products, and not what operators say is computed in float32."""

import pytest
import torch
from torch import Tensor

from model.shapes import tiny_model, tokens

KINDS = {
    "hybrid": {},
    "normed": {"attention_qk_norm": True},
    "attention": {"mixer_types": ["attention"] * 4, "attn_use_rope": True, "attention_qk_norm": True},
    "scaled-logits": {"attn_logits_scaling": 20},
}


def gradient(kind: str, dtype: torch.dtype = torch.float32, autocast: bool = False, packed: bool = False) -> Tensor:
    model, ids = tiny_model(**KINDS[kind]).train().to(dtype), tokens(1 if packed else 2, 150)
    ends = {"cu_seqlens": torch.tensor([0, 70, 71, 150])} if packed else {}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model(ids, labels=ids, **ends).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).float()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_under_autocast_are_no_worse_than_those_of_a_bfloat16_model(kind: str, packed: bool) -> None:
    exact = gradient(kind, packed=packed)

    def error(other: Tensor) -> float:
        return float((other - exact).norm() / exact.norm())

    assert error(gradient(kind, autocast=True, packed=packed)) < 1.2 * error(
        gradient(kind, torch.bfloat16, packed=packed)
    )


@torch.no_grad()
def test_states_stay_float32_under_autocast() -> None:
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model(tokens(1, 90)).past_key_values
    state = cache.layers[1].state_BHKV
    assert state.dtype == torch.float32
    # what has been rounded to bfloat16 is its own rounding
    assert not torch.equal(state, state.bfloat16().float())
