"""A checkpoint is exported when SGLang's loader takes it, and refused with every reason when not."""

import json

import pytest
from safetensors.torch import load_file

from model.shapes import RELEASED_SPARSE, tiny_config
from sala.model import MiniCPMSALAForCausalLM
from sala.model.sglang import packing_obstacles


@pytest.fixture(scope="module")
def servable(tmp_path_factory):
    """Of the released form in all that SGLang asks for: 16 query heads a group, heads of 128."""
    config = tiny_config(
        vocab_size=64,
        num_attention_heads=16,
        num_key_value_heads=1,
        head_dim=128,
        lightning_nh=2,
        lightning_nkv=2,
        lightning_head_dim=128,
        num_hidden_layers=2,
        mixer_types=["minicpm4", "lightning-attn"],
        sparse_config=RELEASED_SPARSE,
        max_position_embeddings=16384,
    )
    path = tmp_path_factory.mktemp("export") / "hybrid"
    MiniCPMSALAForCausalLM(config).save_pretrained(path)
    return path


def test_a_servable_checkpoint_is_written_with_its_command(sala, servable, tmp_path):
    outcome = sala("export", servable, "--for", "sglang", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"python -m sglang.launch_server --model-path {tmp_path / 'out'} ")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in fields and fields["model_type"] == "minicpm_sala"
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert names == set(load_file(servable / "model.safetensors"))


def test_one_that_sglang_cannot_serve_is_refused_with_every_reason(sala, tmp_path):
    outcome = sala("export", "embedded-hybrid", "--for", "sglang", "--out", tmp_path / "out")
    assert outcome.code == 2 and not (tmp_path / "out").exists()
    assert "16 query heads" in outcome.err and "attn_logits_scaling" in outcome.err and "expected" in outcome.err


def test_an_engine_that_nobody_knows_is_refused(sala, servable, tmp_path):
    assert sala("export", servable, "--for", "vllm", "--out", tmp_path / "out").code == 2


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, None),
        ({"bits": 8}, None),
        ({"quant_method": "awq"}, "'awq'"),
        ({"bits": 3}, "bits is 3"),
        ({"sym": False}, "symmetric"),
        ({"desc_act": True}, "desc_act"),
        ({"lm_head": True}, "head"),
        ({"dynamic": {"-:x": {}}}, "dynamic"),
    ],
)
def test_packed_weights_are_those_that_its_kernels_take(changes, word):
    reasons = packing_obstacles({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, **changes})
    assert (word is None and not reasons) or (len(reasons) == 1 and word in reasons[0])
