"""Weights move from attention to linear attention without changing what they mean."""

from collections.abc import Callable

import pytest
import torch

from sala.convert.align import swapped, watch_mixers
from sala.convert.transfer import (
    assemble,
    expand_heads,
    hybrid_config,
    kept_attention,
    linear_twin,
    require_teacher,
    unshare,
)
from sala.errors import ConfigError
from sala.model import MIXERS, MiniCPMSALAConfig
from sala.model.mixers import config_fields, reconfigured

LINEAR = ["lightning-attn"] * 4
IDS = torch.arange(2 * 20).view(2, 20) % 50


def test_expanded_heads_are_the_grouped_layer(teacher_of: Callable, family: str) -> None:
    """Attention with one key/value head a query head gives exactly what grouped attention gave."""
    teacher = teacher_of(family)
    layer = teacher.model.layers[1].self_attn
    config = MiniCPMSALAConfig(**(config_fields(teacher.config) | {"num_key_value_heads": 4}))
    expanded = MIXERS["attention"].module(config)
    state = dict(layer.state_dict())
    for name in [name for name in state if name.startswith(("k_proj", "v_proj"))]:
        state[name] = expand_heads(state[name], 2, 4)
    expanded.load_state_dict(state)
    (x_BTD, rows, y_BTD) = watch_mixers(teacher, IDS)[1]
    torch.testing.assert_close(expanded(x_BTD, rows), y_BTD)


def test_heads_keep_their_order_and_rows_are_not_repeated() -> None:
    weight = torch.arange(6.0)[:, None]  # two heads of width 3
    assert expand_heads(weight, 2, 4).flatten().tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


@pytest.mark.parametrize("gate_init", ["random", "open"])
def test_a_twin_is_the_layer_without_softmax(teacher_of: Callable, family: str, gate_init: str) -> None:
    """Token by token: decayed sums over all earlier keys, from the teacher's own projections."""
    teacher = teacher_of(family)
    layer = teacher.model.layers[2].self_attn
    config = hybrid_config(teacher.config, LINEAR, rope=True, gates=False)
    twin = linear_twin(layer, config, gate_init, torch.Generator().manual_seed(1))
    assert ("q_proj.bias" in twin.state_dict()) == (family == "qwen2")
    for name in ("q_proj.weight", "v_proj.weight"):
        mine, own = twin.state_dict()[name], layer.state_dict()[name]
        torch.testing.assert_close(mine.view(4, 8, 32)[3], own.view(-1, 8, 32)[-1])
    x_BTD, rows, _ = watch_mixers(teacher, IDS)[2]
    out_BTD = twin(x_BTD, rows)
    # at the first token attention is its value; linear attention is that up to the norm's factor a head
    value_BGV = layer.v_proj(x_BTD)[:, 0].view(2, 2, 8)
    heads_BHV = value_BGV.repeat_interleave(2, dim=1)
    query_BHK, key_BGK = layer.q_proj(x_BTD)[:, 0].view(2, 4, 8), layer.k_proj(x_BTD)[:, 0].view(2, 2, 8)
    query_BHK, key_BGK = twin.q_norm(query_BHK), twin.k_norm(key_BGK)
    product_BH = (query_BHK * key_BGK.repeat_interleave(2, dim=1)).sum(-1) * 8**-0.5
    normed = twin.o_norm((product_BH[..., None] * heads_BHV).flatten(1))
    gate = torch.sigmoid(twin.z_proj(x_BTD[:, 0])) * (2 if gate_init == "open" else 1)
    torch.testing.assert_close(out_BTD[:, 0], layer.o_proj(normed * gate))


def test_an_open_gate_changes_nothing_and_a_random_one_does(teacher_of: Callable, family: str) -> None:
    teacher = teacher_of(family)
    layer = teacher.model.layers[0].self_attn
    config = hybrid_config(teacher.config, ["attention"] * 4, rope=True, gates=True)
    x_BTD, rows, y_BTD = watch_mixers(teacher, IDS)[0]
    opened = kept_attention(layer, config, "open", torch.Generator())
    torch.testing.assert_close(opened(x_BTD, rows), y_BTD)
    random = kept_attention(layer, config, "random", torch.Generator())
    assert (random(x_BTD, rows) - y_BTD).norm() > 0.1 * y_BTD.norm()


def test_what_is_not_a_mixer_is_the_teachers_until_it_is_owned(teacher_of: Callable, family: str) -> None:
    teacher = teacher_of(family)
    kinds = ["lightning-attn", "attention", "lightning-attn", "lightning-attn"]
    config = hybrid_config(teacher.config, kinds, rope=False, gates=True)
    generator = torch.Generator()
    mixers = {
        i: (kept_attention if kind == "attention" else linear_twin)(
            teacher.model.layers[i].self_attn, config, "open", generator
        )
        for i, kind in enumerate(kinds)
    }
    hybrid = assemble(teacher, config, mixers)
    ours, theirs = dict(hybrid.named_parameters()), dict(teacher.named_parameters())
    assert ("lm_head.weight" in ours) == (family != "qwen2"), "heads are tied only when the teacher's are"
    for name, parameter in theirs.items():
        if ".self_attn." not in name:
            assert ours[name].data_ptr() == parameter.data_ptr()
    unshare(hybrid)
    assert not {p.data_ptr() for p in hybrid.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    for name, parameter in theirs.items():
        if ".self_attn." not in name:
            torch.testing.assert_close(ours[name], parameter)
    assert hybrid.config.scale_emb == teacher.config.scale_emb
    assert hybrid.config.dim_model_base == teacher.config.dim_model_base

    with swapped(teacher, mixers):
        expected = teacher(IDS, use_cache=False).logits
    torch.testing.assert_close(hybrid(IDS, use_cache=False).logits, expected)


def test_a_swap_ends_also_after_an_error(teacher_of: Callable) -> None:
    teacher = teacher_of()
    own = teacher.model.layers[1].self_attn
    with pytest.raises(ZeroDivisionError), swapped(teacher, {1: torch.nn.Identity()}):
        raise ZeroDivisionError
    assert teacher.model.layers[1].self_attn is own


def test_a_reconfigured_model_is_another_view_of_the_same_parameters(teacher_of: Callable, family: str) -> None:
    teacher = teacher_of(family)
    view = reconfigured(teacher, attn_logits_scaling=32)
    assert {p.data_ptr() for p in view.parameters()} == {p.data_ptr() for p in teacher.parameters()}
    assert view.config.attn_logits_scaling == 32
    assert (view(IDS, use_cache=False).logits - teacher(IDS, use_cache=False).logits).abs().max() > 1e-3


def test_a_hybrid_is_no_teacher(teacher_of: Callable) -> None:
    teacher = teacher_of()
    with pytest.raises(ConfigError, match="the teacher has lightning-attn layers"):
        require_teacher(hybrid_config(teacher.config, LINEAR, rope=True, gates=False))
