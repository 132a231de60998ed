"""What is said of SGLang is what its loader takes."""

import json

import pytest

from model.shapes import RELEASED_SPARSE, released_config
from sala.model import MiniCPMSALAConfig
from sala.model.sglang import why_not_sglang


def released(**changes):
    config = released_config()
    fields = {name: getattr(config, name) for name in MiniCPMSALAConfig.__annotations__}
    return MiniCPMSALAConfig(architectures=config.architectures, **{**fields, **changes})


def obstacles(config, folder):
    """Of the config.json that is written of a configuration."""
    config.save_pretrained(folder)
    return why_not_sglang(config, json.loads((folder / "config.json").read_text()))


def test_the_released_configuration_runs(tmp_path):
    assert obstacles(released(), tmp_path) == ()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_key_value_heads": 4}, "16 query heads"),
        ({"attention_qk_norm": True}, "attention_qk_norm"),
        ({"qkv_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases of MLPs"),
        ({"attention_bias": True}, "its gates have biases"),
        ({"attn_logits_scaling": 500}, "attn_logits_scaling"),
        ({"head_dim": 64}, "head_dim is 64"),
        ({"lightning_nkv": 2}, "lightning_nkv"),
        ({"lightning_head_dim": 64}, "lightning_head_dim is 64"),
        ({"lightning_scale": "1"}, "lightning_scale '1'"),
        ({"mixer_types": ["attention"] * 32}, "block-sparse"),
        ({"max_position_embeddings": 4096}, "room for 8,192 tokens"),
        ({"sparse_config": {"dense_len": 8192}}, "kernel_size, kernel_stride, init_blocks"),
    ],
)
def test_what_would_not_run_has_a_reason(changes, word, tmp_path):
    assert any(word in reason for reason in obstacles(released(**changes), tmp_path))


def test_heads_of_any_width_run_where_nothing_is_selected(tmp_path):
    changes = {"mixer_types": ["attention"] * 32, "sparse_config": None, "head_dim": 64, "attention_bias": True}
    assert obstacles(released(**changes, attn_use_output_gate=False), tmp_path) == ()


def test_a_checkpoint_of_another_model_is_that_models():
    config = released(mixer_types=["attention"] * 32, sparse_config=None)
    for kind in ("llama", None):
        [reason] = why_not_sglang(config, {"model_type": kind})
        assert repr(kind) in reason


def test_what_config_json_leaves_out_is_the_default_of_sglang():
    config = released()
    fields = {"model_type": "minicpm_sala", "sparse_config": RELEASED_SPARSE}
    reasons = why_not_sglang(config, fields)
    assert any("architectures" in reason for reason in reasons)
    # the released values are its defaults, but for what its switches say
    assert {reason.split()[2] for reason in reasons if reason.startswith("it takes ")} == {
        "attn_use_output_gate",
        "attn_use_rope",
        "use_output_gate",
        "use_output_norm",
        "max_position_embeddings",
    }
