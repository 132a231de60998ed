"""Weights from scratch: what each option of `init` does."""

from typing import Any

import pytest
import torch

from sala.errors import RecipeError
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.recipe import Init
from sala.train.initial import initialize


def model(**changes: Any) -> MiniCPMSALAForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 30,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_theta": 1e5,
        "attn_use_rope": True,
        "attn_use_output_gate": False,
        "qkv_bias": True,
    }
    return MiniCPMSALAForCausalLM(MiniCPMSALAConfig(**(fields | changes))).eval()


def test_fan_in_starts_every_layer_as_the_identity() -> None:
    fresh = model()
    initialize(fresh, Init(matrices="fan_in"))
    hidden = fresh.model.embed_tokens(torch.arange(8)[None])
    torch.testing.assert_close(fresh.model(torch.arange(8)[None]).last_hidden_state, fresh.model.norm(hidden))
    assert fresh.model.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)


def test_the_default_changes_nothing() -> None:
    fresh, initialized = model(), model()
    initialize(initialized, Init())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), initialized.parameters(), strict=True))


def test_biases_of_queries_and_keys_alone_are_random() -> None:
    fresh = model()
    initialize(fresh, Init(qk_bias_std=1.0))
    attention = fresh.model.layers[1].self_attn
    assert attention.q_proj.bias.std() > 0.5 and attention.k_proj.bias.std() > 0.5
    assert attention.v_proj.bias.abs().max() == 0


def test_a_lag_head_looks_that_many_tokens_back() -> None:
    fresh = model()
    initialize(fresh, Init(lags=(1, 3)))
    attention = fresh.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
        # a value that says where it comes from, head by head
        attention.v_proj.weight.zero_()
        attention.v_proj.weight[:, :24] = torch.eye(24).repeat(3, 1)[:64]
        heads: list[torch.Tensor] = []
        attention.o_proj.register_forward_pre_hook(lambda _, given: heads.append(given[0].view(1, 24, 4, 32)))
        rows = fresh.model.place(torch.eye(24, 64)[None])
        attention(torch.eye(24, 64)[None], rows)
    for head, lag in ((0, 1), (1, 3)):
        seen_TT = heads[0][0, :, head, :24]
        assert (seen_TT.argmax(-1)[lag:] == torch.arange(24 - lag)).all()
        assert seen_TT.amax(-1)[lag:].min() > 0.9


@pytest.mark.parametrize("init", [Init(qk_bias_std=1.0), Init(lags=(1,))])
def test_biases_that_are_not_there_are_an_error(init: Init) -> None:
    with pytest.raises(RecipeError, match="need query and key biases"):
        initialize(model(qkv_bias=False), init)


def test_more_lags_than_heads_are_an_error() -> None:
    with pytest.raises(RecipeError, match="asks for 5 heads; expected at most the 4 of a layer"):
        initialize(model(), Init(lags=(1, 2, 3, 4, 5)))


def test_lags_in_a_model_that_does_not_turn_are_an_error() -> None:
    with pytest.raises(RecipeError, match=r"expected model\.attn_use_rope: true"):
        initialize(model(attn_use_rope=False), Init(lags=(1,)))
