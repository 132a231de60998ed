"""The configuration is the released one, and refuses what it does not know."""

import pytest
from transformers import AutoConfig

import sala  # noqa: F401 - registers the model
from model.shapes import TINY_SPARSE, released_config, tiny_config
from sala.errors import ConfigError
from sala.model import MiniCPMSALAConfig


def test_the_released_fields_are_all_known():
    config = released_config()
    assert config.layer_types.count("linear_attention") == 24
    assert config.sparse_geometry.num_selected == 96
    assert config.lightning_scale_value == pytest.approx(0.08838834764831845)
    assert config.residual_scale == pytest.approx(0.24748737341529164)


def test_an_unknown_field_is_named():
    with pytest.raises(ConfigError, match="'lightning_hd' = 4.*did you mean 'lightning_nh'"):
        tiny_config(lightning_hd=4)


def test_an_unknown_sparse_field_is_named():
    with pytest.raises(ConfigError, match="'top_k'.*did you mean 'topk'"):
        tiny_config(sparse_config={**TINY_SPARSE, "top_k": 3})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixer_types": ["attention"] * 3}, "3 entries"),
        ({"mixer_types": ["atention"] * 4}, "did you mean 'attention'"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"lightning_scale": "2"}, "1/sqrt"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"attn_logits_scaling": 1}, "above 1"),
        ({"lightning_layerwise_decay": True}, "False"),
        ({"sparse_config": None}, "sparse_config is None"),
    ],
)
def test_a_value_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**change)


def test_aliases_of_mixers_are_one_name():
    assert tiny_config(mixer_types=["lightning", "lightning_attn", "attention", "minicpm4"]).mixer_types == [
        "lightning-attn",
        "lightning-attn",
        "attention",
        "minicpm4",
    ]


def test_a_saved_configuration_reads_back_the_same(tmp_path):
    config = tiny_config(rope_scaling={"rope_type": "linear", "factor": 2.0}, attn_logits_scaling=500)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, MiniCPMSALAConfig)
    assert read.to_diff_dict() == config.to_diff_dict()
