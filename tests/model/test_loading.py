"""transformers' Auto classes load a whole checkpoint of this network, or say in one line what is wrong with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from model.shapes import tiny_config, tiny_model, tokens
from sala import load_model
from sala.errors import CheckpointError, SalaError
from sala.model import MiniCPMSALAForCausalLM

LOADERS: list[Callable[[Path], Any]] = [
    AutoModelForCausalLM.from_pretrained,
    AutoModel.from_pretrained,
    load_model,
]


def saved(folder: Path, **changes: Any) -> Path:
    tiny_model(**changes).save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), r"q_proj.bias' .* no place"),
        (lambda w: w.pop("model.layers.1.self_attn.z_proj.weight"), "lacks 1 tensors, .*z_proj"),
        (lambda w: w.update({"model.layers.1.self_attn.z_proj.qweight": w.pop("model.layers.1.self_attn.z_proj.weight")}), "qweight"),
    ],
)  # fmt: skip
def test_no_tensor_is_dropped_or_drawn(load: Any, change: Any, message: str, tmp_path: Path) -> None:
    change_weights(saved(tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_checkpoint_without_a_head_is_no_language_model(tmp_path: Path) -> None:
    change_weights(saved(tmp_path), lambda w: w.pop("lm_head.weight"))
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(CheckpointError, match=r"the first is 'lm_head.weight'"):
            load(tmp_path)


def test_layers_saved_alone_get_a_new_head(tmp_path: Path) -> None:
    layers = tiny_model().model
    layers.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = layers(tokens(1, 30)).last_hidden_state
        assert torch.equal(model.model(tokens(1, 30)).last_hidden_state, expected)


def test_who_asks_what_was_loaded_judges_by_himself(tmp_path: Path) -> None:
    change_weights(saved(tmp_path), lambda w: w.pop("model.norm.weight"))
    model, info = MiniCPMSALAForCausalLM.from_pretrained(
        pretrained_model_name_or_path=tmp_path, config=tiny_config(), output_loading_info=True
    )
    assert isinstance(model, MiniCPMSALAForCausalLM)
    assert set(info["missing_keys"]) == {"model.norm.weight"}


@pytest.mark.parametrize("load", LOADERS)
def test_tables_of_rotation_are_computed_not_read(load: Any, tmp_path: Path) -> None:
    change_weights(saved(tmp_path), lambda w: w.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "lm_head"])
def test_contradictory_files_are_read_alike(name: str, tmp_path: Path) -> None:
    """A head of its own beside a tied flag, and an index of older shards beside a newer single file."""
    saved(tmp_path, tie_word_embeddings=name == "lm_head")
    if name == "lm_head":
        change_weights(tmp_path, lambda w: w.update({"lm_head.weight": torch.ones(64, 32)}))
    else:
        older = tiny_model()
        with torch.no_grad():
            older.lm_head.weight.zero_()
        weights = older.state_dict()
        save_file(weights, tmp_path / "model-00001-of-00001.safetensors", {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)
    for (key, left), right in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(left, right), key
    assert theirs.lm_head.weight.any()


@pytest.mark.parametrize("load", [*LOADERS, AutoConfig.from_pretrained])
@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"layer_types": ["full_attention"] * 4},
        {"shift_labels": False},
        {"is_causal": False},
        {"partial_rotary_factor": 0.5},
        {"hidden_size_of_a_layer_we_do_not_know": 7},
    ],
)
def test_no_field_that_changes_the_numbers_is_dropped(load: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    change_config(saved(tmp_path), **fields)
    with pytest.raises(SalaError, match=next(iter(fields))):
        load(tmp_path)


@torch.no_grad()
def test_a_model_with_layers_on_the_disk_answers_the_same(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, ids = tiny_model(attention_qk_norm=True), tokens(2, 80)
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.norm": "disk", "lm_head": "disk"}
    places |= {f"model.layers.{layer}": ("cpu", "disk")[layer % 2] for layer in range(4)}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    torch.testing.assert_close(spread(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert spread.generate(ids, **settings).tolist() == model.generate(ids, **settings).tolist()


def test_what_calls_return_is_read_from_the_file(tmp_path: Path) -> None:
    change_config(saved(tmp_path), output_hidden_states=True, return_dict=False)
    for load in (AutoModelForCausalLM.from_pretrained, load_model):
        output = load(tmp_path)(tokens(1, 9))
        assert isinstance(output, tuple)
        assert len(output[-1]) == 5
    change_config(tmp_path, output_attentions=True)
    with pytest.raises(SalaError, match="output_attentions"):
        load_model(tmp_path)(tokens(1, 9))
