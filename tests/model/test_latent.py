"""Latent attention computes what MiniCPM3 does, dense or by blocks, in one call, in chunks and in padded rows."""

import json

import pytest
import torch
from torch.nn.functional import pad
from transformers import AutoConfig, MiniCPM3Config, MiniCPM3ForCausalLM

import sala  # noqa: F401 - registers the model
from model.shapes import TINY_SPARSE, tiny_config, tiny_model, tokens
from sala.errors import ConfigError
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, new_cache, with_mixers
from sala.model.config import LATENT_FIELDS
from sala.model.families import config_from, load_model
from sala.model.mixers import sparse_mixers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "initializer_range": 0.3,
    "dim_model_base": 16,
    # large, so that an epsilon in the wrong norm shows
    "rms_norm_eps": 1e-2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.05, 2.5, 16.5],
    "long_factor": [1.05, 2.5, 16.5],
    "original_max_position_embeddings": 32,
    # max_position_embeddings / original_max_position_embeddings; transformers 5.17 does not open its own class without it
    "factor": 4.0,
}
SOURCES = {
    "default-rope": {},
    # cosine and sine have a factor here, and the sequence is longer than the original length
    "longrope": {"rope_parameters": LONGROPE, "max_position_embeddings": 128},
    "biases-untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "wide-values": {"v_head_dim": 16},
}
LATENT = {
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "head_dim": None,
    "num_key_value_heads": 4,
}
KINDS = {
    "full": {"mixer_types": ["latent-attention"] * 4, "attn_use_rope": True, "attn_use_output_gate": False},
    "sparse": {"mixer_types": ["latent-minicpm4"] * 4, "attn_use_rope": True},
    "hybrid": {"mixer_types": ["latent-minicpm4", "lightning-attn", "lightning-attn", "latent-attention"]},
}


def latent_model(kind: str, **changes):
    return tiny_model(**{**LATENT, **KINDS[kind], **changes})


def source(name: str) -> MiniCPM3ForCausalLM:
    torch.manual_seed(1)
    model = MiniCPM3ForCausalLM(MiniCPM3Config(**SIZES, **SOURCES[name])).eval()
    for key, parameter in model.named_parameters():  # biases and norms start neutral and would hide a lost one
        if key.endswith("bias") or "norm" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_every_tensor_of_the_released_size_has_its_name_and_shape():
    """MiniCPM3-4B, whose numbers are the defaults of transformers' class."""
    fields = MiniCPM3Config()
    with torch.device("meta"):
        theirs, ours = MiniCPM3ForCausalLM(fields), MiniCPMSALAForCausalLM(config_from(fields.to_dict()))
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]
    assert sum(parameter.numel() for parameter in ours.parameters()) == 4_073_875_968


@pytest.mark.parametrize("name", SOURCES)
def test_logits_equal_those_of_the_source(name, tmp_path):
    theirs = source(name)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert (ours.config.scale_emb, ours.config.scale_depth, ours.config.dim_model_base) == (12, 1.4, 16)
    ids = tokens(2, 50)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_released_layout_of_the_configuration_is_read(tmp_path):
    """As the publisher writes it: no tie_word_embeddings, no v_head_dim, rope_scaling with `type`, a derived head_dim."""
    theirs = source("longrope")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    scaling = {"type" if k == "rope_type" else k: v for k, v in fields.pop("rope_parameters").items()}
    fields["rope_theta"] = scaling.pop("rope_theta")
    for name in ("tie_word_embeddings", "v_head_dim", "qk_head_dim", "mlp_bias"):
        del fields[name]
    path.write_text(json.dumps({**fields, "rope_scaling": scaling, "head_dim": 16}))
    ids = tokens(1, 50)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [(1,) * 100, (64, 36), (7, 1, 92)])
def test_chunks_of_any_size_are_one_call(kind, chunks):
    model, ids = latent_model(kind), tokens(2, 100)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = new_cache(model.config)
        parts = [model(part, cache=cache).logits for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind, side):
    model, ids = latent_model(kind), tokens(2, 90)
    alone = [ids[0], ids[1, :37]]
    padded = torch.stack([pad(row, (90 - len(row), 0) if side == "left" else (0, 90 - len(row))) for row in alone])
    mask = (padded > 0).long()
    with torch.no_grad():
        together = model(padded, attention_mask=mask).logits
        for row, row_ids in enumerate(alone):
            expected = model(row_ids[None]).logits[0]
            torch.testing.assert_close(together[row, mask[row].bool()], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_separate_ones(kind):
    model, ids = latent_model(kind), tokens(1, 130)
    ends = torch.tensor([0, 1, 64, 130])
    with torch.no_grad():
        packed = model(ids, cu_seqlens=ends, use_cache=False).logits
        parts = [model(part, use_cache=False).logits for part in ids.split(ends.diff().tolist(), dim=1)]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1), atol=2e-4, rtol=1e-4)


def test_selection_is_another_tuple_on_the_same_tensors():
    full = latent_model("full", sparse_config=TINY_SPARSE)
    kinds = sparse_mixers(full.config.mixer_types, sparse=True)
    assert set(kinds) == {"latent-minicpm4"} and sparse_mixers(kinds, sparse=False) == tuple(full.config.mixer_types)
    sparse = with_mixers(full, kinds)
    assert {p.data_ptr() for p in sparse.parameters()} == {p.data_ptr() for p in full.parameters()}
    ids = tokens(1, 140)
    with torch.no_grad():
        dense_logits, sparse_logits = full(ids).logits[0], sparse(ids).logits[0]
    # a query selects from position dense_len - 1 = 63 on
    torch.testing.assert_close(sparse_logits[:63], dense_logits[:63], atol=1e-5, rtol=1e-5)
    assert (sparse_logits[63:] - dense_logits[63:]).abs().max() > 1e-2
    everything = with_mixers(latent_model("full", sparse_config={**TINY_SPARSE, "topk": 9}), kinds)
    with torch.no_grad():
        torch.testing.assert_close(everything(ids).logits[0], dense_logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="'latent-attention' and 'latent-minicpm4'"):
        with_mixers(full, ["lightning-attn"] * 4)


def test_without_rotation_the_order_of_keys_does_not_matter():
    """HyPE's kept layers: a query over the same set of keys in another order answers the same."""
    for rotates in (True, False):
        model = latent_model("full", attn_use_rope=rotates).model
        x = torch.randn(1, 9, 32)
        shuffled = torch.cat([x[:, torch.tensor([3, 1, 0, 2, 7, 5, 6, 4])], x[:, 8:]], dim=1)
        with torch.no_grad():
            outputs = [model.layers[0].self_attn(y, model.place(y))[:, -1] for y in (x, shuffled)]
        assert torch.allclose(*outputs, atol=1e-5) != rotates


def test_a_saved_latent_configuration_reads_back_and_a_native_one_does_not_mention_latents(tmp_path):
    config = tiny_config(**LATENT, **KINDS["hybrid"])
    assert (config.head_dim, config.v_head_dim, config.lightning_head_dim) == (16, 8, 16)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    tiny_config().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert not set(LATENT_FIELDS) & set(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_lora_rank": None}, "q_lora_rank is None"),
        ({"kv_lora_rank": None}, "kv_lora_rank is None"),
        ({"qk_rope_head_dim": 5}, "an even width"),
        ({"lightning_head_dim": 4}, "at least the rotated 6"),
        ({"head_dim": 12}, "qk_nope_head_dim \\+ qk_rope_head_dim = 16"),
        ({"v_head_dim": 17}, "at most the width of keys, 16"),
        ({"num_key_value_heads": 2}, "num_attention_heads = 4"),
        ({"attention_qk_norm": True}, "norms of their own"),
        ({"qkv_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
        ({"mixer_types": ["attention"] * 4}, "'attention' with kv_lora_rank = 12"),
        (dict.fromkeys(LATENT_FIELDS), "'latent-attention' with kv_lora_rank = None"),
    ],
)
def test_what_no_latent_layer_can_be_built_from_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        MiniCPMSALAConfig(**{**tiny_config().to_dict(), "lightning_nkv": 4, **LATENT, **KINDS["full"], **change})
