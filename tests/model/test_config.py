"""The configuration is the released one, and refuses what it does not know."""

import pytest
from transformers import AutoConfig

import sala  # noqa: F401 - registers the model
from model.shapes import TINY_SPARSE, released_config, tiny_config
from sala.errors import ConfigError
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM


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
        ({"hidden_size": "abc"}, "hidden_size = 'abc'; expected int"),
        ({"hidden_size": -16}, "hidden_size = -16; expected a number above 0"),
        ({"intermediate_size": 2.5}, "intermediate_size = 2.5; expected int"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0; expected a number above 0"),
        ({"num_key_value_heads": True}, "num_key_value_heads = True; expected int or NoneType"),
        ({"mixer_types": 5}, "mixer_types = 5; expected list or tuple"),
        ({"mixer_types": "attention"}, "mixer_types = 'attention'; expected list or tuple"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6'; expected float"),
        ({"rope_theta": "10000"}, "rope_theta = '10000'; expected float or int"),
        ({"sparse_config": [1]}, r"sparse_config = \[1\]; expected dict or NoneType"),
        ({"initializer_range": -1}, "initializer_range = -1; expected 0 or more"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1; expected bool"),
    ],
)
def test_a_value_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**change)


@pytest.mark.parametrize("name", ["scale_emb", "scale_depth", "dim_model_base"])
def test_the_numbers_of_mup_need_not_be_whole(name):
    assert getattr(tiny_config(**{name: 1.5}), name) == 1.5


def test_heads_of_odd_width_cannot_turn():
    config = tiny_config(head_dim=7, attn_use_rope=True)
    with pytest.raises(ConfigError, match="heads of width 7 cannot turn, pair by pair; expected an even head_dim"):
        MiniCPMSALAForCausalLM(config)


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
