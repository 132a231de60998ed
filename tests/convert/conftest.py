"""Tiny random teachers of the families, without downloads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM

LAYERS = 4
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True},
    "qwen3": {"attention_qk_norm": True},
    "minicpm": {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8},
}
# latent attention has projections of its own, and tests of its own
LATENT: dict[str, dict[str, Any]] = {
    "minicpm3": {
        "mixer_types": ["latent-attention"] * LAYERS,
        "num_key_value_heads": 4,
        "head_dim": None,
        "q_lora_rank": 20,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
}


def make_teacher(family: str = "llama", **changes: Any) -> MiniCPMSALAForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "attn_use_rope": True,
        "attn_use_output_gate": False,
        "mixer_types": ["attention"] * LAYERS,
        "initializer_range": 0.3,
    }
    model = MiniCPMSALAForCausalLM(MiniCPMSALAConfig(**(fields | (FAMILIES | LATENT)[family] | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[*FAMILIES, *LATENT])
def any_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def teacher_of() -> Callable[..., MiniCPMSALAForCausalLM]:
    return make_teacher
