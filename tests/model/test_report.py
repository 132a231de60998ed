"""A checkpoint's facts are those of the network and the cache it makes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.shapes import RELEASED_SPARSE_LAYERS, released_config, tiny_config, tiny_model, tokens
from sala.errors import CheckpointError
from sala.model import new_cache
from sala.model.report import (
    cache_bytes,
    cache_bytes_per_token,
    inspect,
    num_parameters,
    parameters_by_kind,
)


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("length", [1, 7, 31, 32, 100, 257])
@pytest.mark.parametrize("mixers", [["minicpm4", "lightning-attn"], ["attention", "attention"]])
def test_cache_bytes_are_those_of_the_cache(mixers, length):
    model = tiny_model(num_hidden_layers=2, mixer_types=mixers)
    cache = new_cache(model.config)
    with torch.no_grad():
        model(tokens(1, length), cache=cache)
    assert cache_bytes(model.config, length, 4) == cache.size_bytes


def test_numbers_of_the_released_model():
    config = released_config()
    assert num_parameters(config) == 9_477_203_968
    kinds = parameters_by_kind(config)
    assert kinds["embeddings"] == 2 * 73448 * 4096
    assert kinds["mlp"] == 32 * 3 * 4096 * 16384
    assert sum(kinds.values()) == 9_477_203_968
    # 8192 bytes of keys and values a token, 256 + 64 of compressed keys, 48 MiB of states
    assert cache_bytes_per_token(config, 2) == 8192 + 320
    assert cache_bytes(config, 0, 2) == 48 * 2**20
    assert len(RELEASED_SPARSE_LAYERS) == 8


def test_tied_embeddings_count_once():
    model = tiny_model(tie_word_embeddings=True)
    assert num_parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


def test_a_report_has_what_the_folder_holds(folder):
    report = inspect(folder)
    assert report.total_parameters == sum(parameter.numel() for parameter in tiny_model().parameters())
    assert report.mixer_types == tuple(tiny_config().mixer_types)
    assert report.dtype == "float32"
    assert report.backends.keys() == {"dense", "infllm", "lightning"}
    assert report.cache_bytes["1M"] > report.cache_bytes["128K"] > report.state_bytes > 0
    assert json.loads(json.dumps(report.to_dict()))["total_parameters"] == report.total_parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), "lacks 1 tensors, the first is 'model.norm.weight'"),
        (lambda state: state.update({"model.norm.weight": torch.ones(7)}), r"has shape \(7,\); expected \(32,\)"),
        (lambda state: state.update({"model.nrom.weight": torch.ones(7)}), "did you mean 'model.norm.weight'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, folder):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        inspect(folder)


def test_a_truncated_shard_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        inspect(folder)
