"""A source checkpoint in our class computes what transformers' own class computes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sala.errors import CheckpointError
from sala.model.families import load_config, load_model
from sala.model.report import inspect, network_shapes
from tolerances import assert_close

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SOURCES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama-biases-untied": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama3-rope": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama-wide-heads": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=16, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16)),
}


def source(name: str):
    kind, config = SOURCES[name]
    torch.manual_seed(1)
    model = kind(config).eval()
    for key, parameter in model.named_parameters():  # biases and norms start neutral and would hide a lost one
        if key.endswith("bias") or "norm" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", SOURCES)
def test_logits_equal_those_of_the_source(name, tmp_path):
    theirs = source(name)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    ids = torch.randint(0, 64, (2, 37))
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits)


def test_muP_numbers_of_a_minicpm_checkpoint_are_kept(tmp_path):
    source("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["mlp_bias"]  # not a field of theirs
    path.write_text(
        json.dumps({**fields, "model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8})
    )
    plain, scaled = source("llama"), load_model(tmp_path)
    ids = torch.randint(0, 64, (1, 9))
    with torch.no_grad():
        hidden = plain.model.embed_tokens(ids) * 12
        positions = torch.arange(9)[None]
        rotary = plain.model.rotary_emb(hidden, positions)
        causal = torch.full((9, 9), -torch.inf).triu(1)[None, None]
        for layer in plain.model.layers:
            normed = layer.input_layernorm(hidden)
            hidden = (
                hidden + layer.self_attn(normed, position_embeddings=rotary, attention_mask=causal)[0] * 1.4 / 3**0.5
            )
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden)) * 1.4 / 3**0.5
        expected = plain.lm_head(plain.model.norm(hidden) / 4)
        torch.testing.assert_close(scaled(ids).logits, expected, atol=1e-5, rtol=1e-5)


def rewrite(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported: llama"),
        ({"partial_rotary": 0.5}, "unknown field 'partial_rotary'"),
        ({"hidden_size": 64}, "shape"),
        ({"hidden_size": None}, "hidden_size is None in a llama configuration; expected a whole number"),
        ({"intermediate_size": "abc"}, "intermediate_size = 'abc'; expected int"),
        ({"rms_norm_eps": None}, "rms_norm_eps = None; expected float"),
        ({"num_hidden_layers": 4}, "lacks .* tensors"),
        ({"num_hidden_layers": 2}, "has no place"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' is not supported"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(fields, message, tmp_path):
    source("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, **fields)
    with pytest.raises(Exception, match=message) as caught:
        load_model(tmp_path)
    assert type(caught.value).__module__ == "sala.errors"


def test_a_truncated_shard_is_refused(tmp_path):
    source("llama").save_pretrained(tmp_path)
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(tmp_path)


def test_a_missing_shard_is_refused(tmp_path):
    source("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002"):
        load_model(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        load_model(tmp_path / "nothing")


def test_a_name_that_the_hub_cannot_have_is_refused():
    with pytest.raises(CheckpointError, match=r"'my models/first' is neither a folder nor .*HFValidationError"):
        load_config("my models/first")


def test_of_the_hub_a_configuration_is_fetched_alone(monkeypatch, tmp_path):
    source("llama").save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(tmp_path)
    )
    assert load_config("someone/model").num_hidden_layers == load_model("someone/model").config.num_hidden_layers
    assert asked[0] == ["config.json"] and "*.safetensors" in asked[1]


def test_a_head_of_its_own_is_used_whatever_the_file_says_of_tying(tmp_path):
    theirs = source("llama")  # with a head of its own
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, tie_word_embeddings=True)
    ours, again = load_model(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 64, (1, 9))
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits)
        assert_close(again(ids).logits, theirs(ids).logits)
    assert not load_config(tmp_path).tie_word_embeddings
    assert "lm_head.weight" in network_shapes(ours.config) and inspect(tmp_path).total_parameters == num(theirs)
    ours.save_pretrained(tmp_path / "saved")
    assert load_model(tmp_path / "saved").lm_head.weight is not load_model(tmp_path / "saved").model.embed_tokens.weight


def num(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_copy_of_a_tied_head_is_left_out(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    table = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    save_file({**tensors, **table, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    ours = load_model(tmp_path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight and load_config(tmp_path).tie_word_embeddings


def test_one_file_goes_before_an_index_as_in_transformers(tmp_path):
    source("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    newer = LlamaForCausalLM(LlamaConfig(**SIZES))
    save_file({name: tensor.clone() for name, tensor in newer.state_dict().items()}, tmp_path / "model.safetensors")
    ids = torch.randint(0, 64, (1, 9))
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits
        assert_close(expected, newer(ids).logits)
        assert_close(load_model(tmp_path)(ids).logits, expected)


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    # transformers would add it to them
    source("llama").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    for read in (load_model, inspect):
        with pytest.raises(CheckpointError, match=r"adapter_config.json.*; expected merged weights"):
            read(tmp_path)


def test_a_folder_with_a_gguf_file_alone_says_its_name(tmp_path):
    (tmp_path / "x.Q4_K_M.gguf").touch()
    with pytest.raises(
        CheckpointError, match=r"config.json is missing in .*; expected one, or the name of its file .*x.Q4"
    ):
        load_model(tmp_path)


def test_a_configuration_alone_needs_no_weights(tmp_path):
    source("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert load_config(tmp_path).num_hidden_layers == 3
