"""A shipped hybrid is the hybrid, but for rounding of its mixers; what does not belong together is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.gguf_files import write_gguf
from sala.errors import CheckpointError, InputError
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, fetch, shipment
from sala.model.checkpoint import find_checkpoint, read_tensors
from sala.model.families import load_model
from sala.model.mixers import config_fields

BASE = "smollm2-135m-instruct"


@pytest.fixture
def hybrid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a hybrid whose teacher, a small file, stands where a fetched one would."""
    monkeypatch.setenv("SALA_CACHE", str(tmp_path / "cache"))
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "attn_use_rope": True,
        "attn_use_output_gate": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    teacher = MiniCPMSALAForCausalLM(MiniCPMSALAConfig(**fields))
    row = fetch.FETCHABLE[BASE]
    file = write_gguf(row.place, teacher)
    changed = dataclasses.replace(row, sha256=shipment._sha256(file))
    for module in (fetch, shipment):
        monkeypatch.setattr(module, "FETCHABLE", {BASE: changed})
    config = MiniCPMSALAConfig(**config_fields(teacher.config) | {"mixer_types": ["lightning-attn", "attention"]})
    model = MiniCPMSALAForCausalLM(config)
    shared = {name: tensor for name, tensor in teacher.state_dict().items() if ".self_attn." not in name}
    model.load_state_dict(model.state_dict() | shared)
    model.save_pretrained(tmp_path / "hybrid")
    return tmp_path / "hybrid"


def pack(hybrid: Path, out: Path, limit: int = 10**6) -> dict[str, Any]:
    out.mkdir()
    return shipment.pack(read_tensors(hybrid), hybrid, BASE, out, limit)


def test_a_shipment_is_the_hybrid_but_for_rounding(hybrid: Path, tmp_path: Path) -> None:
    facts = pack(hybrid, tmp_path / "small")
    assert facts["levels"] == 127 and not (tmp_path / "small" / "model.safetensors").exists()
    place = find_checkpoint(tmp_path / "small")
    assert place == find_checkpoint(tmp_path / "small"), "put together once"
    ours, theirs = load_model(place, dtype=torch.float32), load_model(hybrid, dtype=torch.float32)
    assert ours.config.mixer_types == theirs.config.mixer_types
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        error = (mine - other).norm() / other.norm()
        assert error < (0.01 if ".self_attn." in name else 0.004), name


def test_a_limit_takes_fewer_levels_or_is_refused(hybrid: Path, tmp_path: Path) -> None:
    whole = pack(hybrid, tmp_path / "whole")
    size = (tmp_path / "whole" / "mixers.npz").stat().st_size
    smaller = pack(hybrid, tmp_path / "smaller", size - 1)
    assert smaller["levels"] < whole["levels"]
    with pytest.raises(InputError, match="the mixers take .* MB in 63 levels; expected at most 0.0 MB"):
        pack(hybrid, tmp_path / "none", 100)


def test_a_hybrid_that_trained_more_is_refused(hybrid: Path, tmp_path: Path) -> None:
    model = load_model(hybrid, dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data *= 1.1
    model.save_pretrained(tmp_path / "more")
    with pytest.raises(InputError, match=r"'model.layers.1.mlp.up_proj.weight' is not that of smollm2-135m-instruct"):
        pack(tmp_path / "more", tmp_path / "small")


def test_files_that_do_not_belong_together_are_refused(hybrid: Path, tmp_path: Path) -> None:
    pack(hybrid, tmp_path / "small")
    facts = json.loads((tmp_path / "small" / "shipment.json").read_text())
    (tmp_path / "small" / "shipment.json").write_text(json.dumps(facts | {"base_sha256": "0"}))
    with pytest.raises(CheckpointError, match="expected 0: fetch smollm2-135m-instruct again"):
        find_checkpoint(tmp_path / "small")
    shipment.FETCHABLE[BASE].place.unlink()
    with pytest.raises(CheckpointError, match="expected `sala fetch smollm2-135m-instruct` first"):
        find_checkpoint(tmp_path / "small")
    with (tmp_path / "small" / "mixers.npz").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="mixers.npz has sha256"):
        find_checkpoint(tmp_path / "small")
