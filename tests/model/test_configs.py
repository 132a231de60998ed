"""Real config.json files open, and say what transformers' own classes read in them."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.shapes import tiny_model
from model.test_families import SIZES, rewrite, source
from sala.errors import CheckpointError, ConfigError
from sala.model import fields
from sala.model.config import LATENT_FIELDS
from sala.model.families import FAMILIES, SHARED_FIELDS, config_from, load_config, load_model
from sala.model.rope import inverse_frequencies

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}
# the class of MiniCPM's first and fourth generation is not part of transformers
OF_TRANSFORMERS = [name for name in CONFIGS if not name.startswith(("minicpm-2b", "minicpm4"))]
NOT_COMPARED = {"head_dim", "rope_theta", "rope_scaling", "rope_parameters"}


def read(name: str) -> dict:
    return json.loads(CONFIGS[name].read_text())


def rotation(config: PreTrainedConfig) -> tuple[torch.Tensor, float]:
    """What transformers' rotary embedding turns by, and its factor on cosine and sine."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2) / width), 1.0
    return ROPE_INIT_FUNCTIONS[kind](config)


@pytest.fixture(autouse=True)
def lines(caplog):
    fields.say_once.cache_clear()
    caplog.set_level(logging.INFO, logger="sala")
    return caplog


@pytest.mark.parametrize("name", CONFIGS)
def test_a_real_file_opens(name):
    config = config_from(read(name))
    assert config.num_hidden_layers == read(name)["num_hidden_layers"]
    assert config.dtype == getattr(torch, read(name).get("dtype") or read(name)["torch_dtype"])


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_a_real_file_says_what_transformers_reads_in_it(name):
    ours, theirs = config_from(read(name)), CONFIG_MAPPING[read(name)["model_type"]](**read(name))
    for field in {*SHARED_FIELDS} - NOT_COMPARED:
        assert getattr(ours, field) == getattr(theirs, field), field
    width = ours.qk_rope_head_dim or ours.head_dim
    (mine, factor), (other, their_factor) = inverse_frequencies(ours, width), rotation(theirs)
    torch.testing.assert_close(torch.tensor(mine), other.float())
    assert factor == pytest.approx(their_factor)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind in CONFIG_MAPPING])
def test_a_field_that_is_absent_has_the_value_of_transformers_own_class(kind):
    # a Mistral without the field reads a window, which is refused
    given = {"sliding_window": None} if kind == "mistral" else {}
    ours, theirs = config_from({"model_type": kind, **given}), CONFIG_MAPPING[kind](**given)
    own = {*FAMILIES[kind].own} | ({*LATENT_FIELDS} if kind == "minicpm3" else set())
    for field in {*SHARED_FIELDS, *own} - NOT_COMPARED:
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    if kind != "minicpm3":  # where theirs is the rotated part
        assert ours.head_dim == getattr(theirs, "head_dim", ours.hidden_size // ours.num_attention_heads)


def test_a_minicpm_without_the_fields_has_the_values_of_its_own_code():
    config = config_from({"model_type": "minicpm"})
    assert (config.scale_emb, config.scale_depth, config.dim_model_base) == (1, 1, 1)
    assert config.tie_word_embeddings


LLAMA = {"model_type": "llama", **SIZES}


def test_fields_that_change_nothing_are_left_out_with_one_line(lines):
    for _ in range(2):
        config_from({**LLAMA, "unsloth_fixed": True, "max_length": 4096, "use_vision": False, "layers_to_skip": []})
    assert [record.message for record in lines.records] == [
        "fields of a llama configuration that change nothing here are left out: "
        "layers_to_skip, max_length, unsloth_fixed, use_vision"
    ]


def test_a_plain_file_is_worth_no_line(lines):
    config_from(read("llama-3.1-8b-instruct"))
    assert not lines.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_multiplier": 0.1}, "unknown field 'attention_multiplier' = 0.1 in a llama configuration"),
        ({"num_experts": 0}, "unknown field 'num_experts' = 0"),
        ({"rms_norm_epsilon": 1e-6}, "did you mean 'rms_norm_eps'"),
        ({"rope_interleaved": True}, "rope_interleaved = True in a llama configuration; expected False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 in .*; expected 1"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True in .*; expected False"),
        ({"is_causal": False}, "is_causal = False in .*; expected True"),
        ({"rotary_emb_base": 50000}, "rotary_emb_base = 50000 beside rope_theta = 10000"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method = 'awq'; expected 'gptq'"),
        ({"compression_config": {"format": "pack"}}, "unknown field 'compression_config'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "unknown field 'mrope_section'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "'partial_rotary_factor' = 0.5"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types has 'sliding_attention'"),
        ({"dtype": "float8_e4m3fn"}, "dtype = 'float8_e4m3fn'; expected one of float32"),
        ({"torch_dtype": "auto"}, "dtype = 'auto'; expected one of float32"),
        ({"model_type": "mistral", "sliding_window": 128}, "sliding_window = 128 in a mistral configuration"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window = 4096 in a mistral"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1},
            "sliding_window = 128 in a qwen2 configuration; expected null",
        ),
    ],
)
def test_what_may_change_the_numbers_is_refused(change, message):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        config_from({**LLAMA, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral", "sliding_window": 512},  # as long as any text
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 3},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 128, "max_window_layers": 1},
        {"rotary_emb_base": 10000.0},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    ],
)
def test_what_says_no_more_than_the_network_does_passes(change):
    assert config_from({**LLAMA, **change}).rope_scaling is None


def test_an_attribute_of_a_user_is_kept_and_loads_again(tmp_path):
    model = tiny_model()
    model.config.my_note, model.config.run = "run 7", {"step": 3}
    model.save_pretrained(tmp_path)
    for config in (load_model(tmp_path).config, AutoConfig.from_pretrained(tmp_path)):
        assert (config.my_note, config.run) == ("run 7", {"step": 3})
        config.save_pretrained(tmp_path)


def test_a_plain_model_has_no_fields_of_a_user(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").save_pretrained(tmp_path)
    assert "user_fields" not in json.loads((tmp_path / "config.json").read_text())


def test_a_user_cannot_hide_how_weights_are_stored(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, quantization_config={"quant_method": "awq", "bits": 4}, user_fields=["quantization_config"])
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ConfigError, match="quant_method = 'awq'"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift_labels": False}, "shift_labels = False in the model configuration; expected True"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types = .* contradict mixer_types; expected"),
        ({"lightning_hd": 4}, "unknown field 'lightning_hd' = 4 .*did you mean 'lightning_nh'"),
    ],
)
def test_a_native_file_that_contradicts_the_network_is_refused(change, message, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    rewrite(tmp_path, **change)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path)


def test_the_layer_types_of_a_native_file_may_be_there(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, layer_types=model.config.layer_types, shift_labels=True)
    assert load_config(tmp_path).mixer_types == model.config.mixer_types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("said", [True, False])
def test_the_stored_dtype_is_kept(dtype, said, tmp_path):
    source("llama").to(dtype).save_pretrained(tmp_path)
    if not said:
        rewrite(tmp_path, dtype=None)
    assert load_config(tmp_path).dtype == load_model(tmp_path).dtype == dtype
    assert LlamaForCausalLM.from_pretrained(tmp_path).dtype == dtype
