"""A GGUF file in our class computes what transformers computes from it."""

import math

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from model.gguf_files import write_gguf
from sala.errors import CheckpointError, InputError
from sala.model import gguf as reading
from sala.model.families import load_config, load_model
from sala.model.packing import packed_modules
from sala.model.report import inspect
from tolerances import assert_close

# quantised rows are whole blocks of 32 numbers
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "rms_norm_eps": 2**-17,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SOURCES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama-wide-heads": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=32)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    # transformers reads no other width of heads from a file of Qwen3
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=128)),
}


def source(name: str = "llama"):
    kind, config = SOURCES[name]
    torch.manual_seed(1)
    model = kind(config).eval()
    for key, parameter in model.named_parameters():  # biases and norms start neutral and would hide a lost one
        if key.endswith("bias") or "norm" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("name", SOURCES)
def test_logits_equal_those_of_transformers_own_reader(name, kind, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", source(name), kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    assert_close(logits(load_model(file, dtype=torch.float32), IDS), logits(theirs, IDS))


@pytest.mark.parametrize("name", SOURCES)
def test_logits_equal_those_of_the_model_that_was_written(name, tmp_path):
    model = source(name)
    file = write_gguf(tmp_path / "x.gguf", model)
    assert_close(logits(load_model(file), IDS), logits(model, IDS))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("name", SOURCES)
def test_packed_matrices_are_the_numbers_that_are_stored(name, kind, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", source(name), kind)
    dense, packed = load_model(path, dtype=torch.float32), load_model(path, dtype=torch.float32, keep_packed=True)
    parts = dict(packed_modules(packed))
    assert len(parts) >= 14
    for place, part in parts.items():
        torch.testing.assert_close(
            part.weight_NK(torch.float32), dense.get_submodule(place).weight, rtol=1e-6, atol=1e-6
        )
    ids = torch.arange(3, 23)[None]
    with torch.inference_mode():
        expected, got = dense(ids).logits, packed(ids).logits
    assert (got - expected).norm() < 0.05 * expected.norm()
    with pytest.raises(InputError, match="in use as they are; expected"):
        packed.state_dict()


def test_a_scale_that_is_not_finite_is_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", source(), "Q8_0")
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    content = bytearray(path.read_bytes())
    content[tensor.data_offset : tensor.data_offset + 2] = b"\x00\x7e"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="'blk.0.ffn_up.weight' has scales that are not finite; expected"):
        load_model(path, keep_packed=True)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q5_1", "Q4_0"])
def test_stored_kinds_of_numbers_are_dequantised(kind, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", source(), kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    assert_close(logits(load_model(file, dtype=torch.float32), IDS), logits(theirs, IDS))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q4_1", torch.bfloat16)],
)
def test_the_stored_dtype_is_kept_and_of_quantised_weights_bfloat16(kind, dtype, tmp_path):
    file = write_gguf(tmp_path / "x.gguf", source(), kind)
    assert load_model(file).dtype == load_model(file, dtype="stored").dtype == load_config(file).dtype == dtype
    assert inspect(file).dtype == str(dtype).removeprefix("torch.")


def packed(kind: str, rows: int, columns: int) -> np.ndarray:
    """Random super-blocks of 256 numbers, which the package reads but does not write, with small scales."""
    size = {"Q4_K": 144, "Q6_K": 210}[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
    if kind == "Q4_K":  # a scale and a smallest number come first
        blocks[..., :4] = np.tile(scale, 2)
    else:
        blocks[..., -2:] = scale
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_super_blocks_are_dequantised(kind, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 256, "intermediate_size": 256}))
    file = write_gguf(tmp_path / "x.gguf", model, kind, pack=packed)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    expected = logits(theirs, IDS)
    assert expected.isfinite().all()
    assert_close(logits(load_model(file, dtype=torch.float32), IDS), expected)


def test_biases_of_a_llama_are_found(tmp_path):
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    assert_close(logits(load_model(write_gguf(tmp_path / "x.gguf", model)), IDS), logits(model, IDS))


def llama3_factors(width: int, factor: float = 8.0) -> np.ndarray:
    """As llama.cpp's converter computes them, one frequency after the other."""
    factors = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * 500000.0 ** (i / width)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_the_rotation_of_llama_3_is_known_by_its_factors(tmp_path):
    torch.manual_seed(1)
    config = LlamaConfig(**{**SIZES, "hidden_size": 128, "num_attention_heads": 2}, rope_parameters=LLAMA3)
    model = LlamaForCausalLM(config).eval()
    file = write_gguf(tmp_path / "x.gguf", model, arrays={"rope_freqs.weight": llama3_factors(64)})
    ours = load_model(file)
    assert ours.config.rope_scaling == {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    assert_close(logits(ours, IDS), logits(model, IDS))


def test_other_factors_of_rotation_are_refused(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", source(), arrays={"rope_freqs.weight": np.linspace(1, 8, 8, dtype="f4")})
    with pytest.raises(CheckpointError, match="factors of 'rope_freqs.weight' in .* are not those of Llama 3"):
        load_model(file)


def test_yarn_is_read_from_its_keys(tmp_path):
    torch.manual_seed(1)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=yarn)).eval()
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    file = write_gguf(
        tmp_path / "x.gguf", model, keys={f"qwen2.rope.scaling.{key}": value for key, value in keys.items()}
    )
    assert_close(logits(load_model(file), IDS), logits(model, IDS))


def test_both_tokens_that_end_an_answer_are_kept(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", source(), keys={"tokenizer.ggml.eot_token_id": 7})
    model = load_model(file)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [2, 7]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"llama.expert_count": 8}, "unknown key 'llama.expert_count' = 8"),
        ({"llama.attention.sliding_window": 4096}, "unknown key 'llama.attention.sliding_window' = 4096"),
        ({"llama.logit_scale": 8.0}, "unknown key 'llama.logit_scale'"),
        ({"llama.attention.value_length": 8}, "value_length = 8 in .*; expected the width of a head, 16"),
        ({"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0}, "'su' is not supported"),
        ({"split.count": 3}, "is one of 3 parts"),
    ],
)
def test_a_file_that_says_something_else_of_the_forward_pass_is_refused(keys, message, tmp_path):
    with pytest.raises(Exception, match=message) as caught:
        load_model(write_gguf(tmp_path / "x.gguf", source(), keys=keys))
    assert type(caught.value).__module__ == "sala.errors"


def test_keys_that_are_off_pass(tmp_path):
    load_model(write_gguf(tmp_path / "x.gguf", source(), keys={"llama.expert_count": 0}))


def test_a_tensor_without_a_place_is_refused(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", source(), arrays={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match="'blk.0.attn_sinks.weight' in .* has no place in the network"):
        load_model(file)


def test_another_architecture_is_refused_by_name(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "x.gguf", source("qwen3"))
    monkeypatch.delitem(reading.ARCHITECTURES, "qwen3")
    with pytest.raises(CheckpointError, match="general.architecture = 'qwen3' in .*; expected one of llama, qwen2"):
        load_config(file)


def test_a_file_that_is_cut_off_or_none_is_refused(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", source())
    whole = file.read_bytes()
    for size in (len(whole) - 1000, len(whole) // 2, 200, 20, 3, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated or not a GGUF file"):
            load_model(file)
    file.write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(CheckpointError, match="truncated or not a GGUF file"):
        load_model(file)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no folder or GGUF file .*x.gguf'; expected"):
        load_model(tmp_path / "x.gguf")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "x.gguf", source())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs `gguf`.*pip install 'sala\[gguf\]'"):
        load_config(file)
