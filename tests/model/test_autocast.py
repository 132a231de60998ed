"""Autocast rounds matrix products, and not what operators say is computed in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.shapes import tiny_model, tokens
from sala.model import attention, infllm, lightning

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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_operators_get_bfloat16_and_are_not_cast_within(
    kind: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they compute in float32, states and sums of probabilities, autocast would round to bfloat16."""
    seen: list[tuple[torch.dtype, bool]] = []
    for module in (lightning, attention, infllm):
        for name in ("lightning_attention", "dense_attention", "infllm_attention"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, watched(getattr(module, name), seen))
    gradient(kind, autocast=True, packed=packed)
    assert set(seen) == {(torch.bfloat16, False)}


def watched(operator: Callable[..., Any], seen: list[tuple[torch.dtype, bool]]) -> Callable[..., Any]:
    def call(q: Tensor, *args: Any, **options: Any) -> Any:
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return operator(q, *args, **options)

    return call


@torch.no_grad()
def test_states_stay_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = tiny_model()(tokens(1, 90)).past_key_values
    assert cache.layers[1].state_BHKV.dtype == torch.float32
