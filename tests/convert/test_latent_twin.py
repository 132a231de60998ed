"""A latent layer multiplied out is the same layer up to the sizes of its latents."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize

from sala.convert.align import swapped, watch_mixers
from sala.convert.latent import plain_projections
from sala.convert.transfer import assemble, hybrid_config, kept_attention, linear_twin, require_teacher
from sala.model import MiniCPMSALAForCausalLM
from sala.model.kinds import SPARSE_ROWS
from sala.model.latent import LatentAttention
from sala.model.mixers import reconfigured

HEADS, WIDTH, ROTATED, VALUES = 4, 12, 4, 8
LINEAR = ["lightning-attn"] * 4
IDS = torch.arange(2 * 20).view(2, 20) % 50
SPARSE = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 8, "topk": 2, "dense_len": 8}


@pytest.fixture(params=[False, True], ids=["plain", "biases"])
def teacher(teacher_of: Callable, request: pytest.FixtureRequest) -> MiniCPMSALAForCausalLM:
    return teacher_of(
        "minicpm",
        mixer_types=["latent-attention"] * 4,
        num_key_value_heads=HEADS,
        head_dim=None,
        q_lora_rank=20,
        kv_lora_rank=10,
        qk_nope_head_dim=WIDTH - ROTATED,
        qk_rope_head_dim=ROTATED,
        v_head_dim=VALUES,
        attention_bias=request.param,
    )


def make_twin(teacher: MiniCPMSALAForCausalLM, layer: int, gate_init: str = "open"):
    config = hybrid_config(teacher.config, LINEAR, rope=True, gates=False)
    return linear_twin(teacher.model.layers[layer].self_attn, config, gate_init, torch.Generator().manual_seed(1))


def projected(twin: torch.nn.Module, x_BTD: torch.Tensor) -> list[torch.Tensor]:
    return [getattr(twin, name)(x_BTD).unflatten(-1, (HEADS, -1)) for name in ("q_proj", "k_proj", "v_proj")]


@torch.no_grad()
def test_only_a_size_a_token_is_lost(teacher: MiniCPMSALAForCausalLM) -> None:
    """Queries, values and the keys' own part are a number a token times the teacher's; the rotated part is equal."""
    layer, twin = teacher.model.layers[1].self_attn, make_twin(teacher, 1)
    x_BTD = watch_mixers(teacher, IDS)[1][0]
    q, k, v = layer.project(x_BTD)
    twin_q, twin_k, twin_v = projected(twin, x_BTD)
    assert twin_v.shape[-1] == VALUES < WIDTH == twin_k.shape[-1]
    torch.testing.assert_close(twin_k[..., -ROTATED:], k[..., -ROTATED:])
    # of all heads at once: the lost number is one a token, not one a head
    torch.testing.assert_close(normalize(twin_q.flatten(2), dim=-1), normalize(q.flatten(2), dim=-1))
    latents = [
        torch.cat((a[..., :-ROTATED], b), dim=-1).flatten(2) for a, b in ((twin_k, twin_v), (k, v[..., :VALUES]))
    ]
    torch.testing.assert_close(normalize(latents[0], dim=-1), normalize(latents[1], dim=-1))


@torch.no_grad()
def test_the_q_norm_cancels_what_queries_lost(teacher: MiniCPMSALAForCausalLM) -> None:
    layer, twin = teacher.model.layers[2].self_attn, make_twin(teacher, 2)
    x_BTD = watch_mixers(teacher, IDS)[2][0]
    twin.q_norm.eps = 0.0
    torch.testing.assert_close(twin.q_norm(projected(twin, x_BTD)[0]), twin.q_norm(layer.project(x_BTD)[0]))


@torch.no_grad()
def test_the_number_that_stands_in_is_right_on_average(teacher: MiniCPMSALAForCausalLM) -> None:
    """For white noise the twin's values are as large as the teacher's."""
    layer, twin = teacher.model.layers[0].self_attn, make_twin(teacher, 0)
    x_BTD = torch.randn(1, 4000, 32)
    ratio_BT = projected(twin, x_BTD)[2].flatten(2).norm(dim=-1) / layer.project(x_BTD)[2].flatten(2).norm(dim=-1)
    assert ratio_BT.square().mean().item() == pytest.approx(1.0, abs=0.05)


@torch.no_grad()
def test_the_number_that_is_lost_is_the_size_of_the_latent(teacher: MiniCPMSALAForCausalLM) -> None:
    layer, twin = teacher.model.layers[0].self_attn, make_twin(teacher, 0)
    x_BTD = watch_mixers(teacher, IDS)[0][0]
    latent_BTR = layer.kv_a_proj_with_mqa(x_BTD)[..., : layer.latent_width]
    size_BT = (latent_BTR.square().mean(dim=-1) + layer.kv_a_layernorm.eps).sqrt()
    larger_BT = projected(twin, x_BTD)[2].flatten(2).norm(dim=-1) / layer.project(x_BTD)[2].flatten(2).norm(dim=-1)
    torch.testing.assert_close(larger_BT / larger_BT[0, 0], size_BT / size_BT[0, 0])


@torch.no_grad()
def test_the_first_token_is_its_value_through_norm_gate_and_output(teacher: MiniCPMSALAForCausalLM) -> None:
    layer, twin = teacher.model.layers[3].self_attn, make_twin(teacher, 3)
    x_BTD, rows, _ = watch_mixers(teacher, IDS)[3]
    q, k, v = (part[:, 0] for part in projected(twin, x_BTD))
    product_BH1 = (twin.q_norm(q) * twin.k_norm(k)).sum(-1, keepdim=True) * WIDTH**-0.5
    expected = layer.o_proj(twin.o_norm((product_BH1 * v).flatten(1)) * 2 * torch.sigmoid(twin.z_proj(x_BTD[:, 0])))
    torch.testing.assert_close(twin(x_BTD, rows)[:, 0], expected)


@torch.no_grad()
def test_bfloat16_products_are_rounded_once(teacher: MiniCPMSALAForCausalLM) -> None:
    layer = teacher.model.layers[0].self_attn.bfloat16()
    rounded = plain_projections(layer)
    exact = plain_projections(layer.float())
    for name, tensor in rounded.items():
        torch.testing.assert_close(tensor, exact[name].bfloat16(), atol=0, rtol=0)


@torch.no_grad()
def test_kept_layers_stay_latent_and_the_hybrid_reads_on(teacher: MiniCPMSALAForCausalLM) -> None:
    require_teacher(teacher.config)
    kinds = ["latent-attention", "lightning-attn", "lightning-attn", "latent-attention"]
    config = hybrid_config(teacher.config, kinds, rope=False, gates=True, sparse_config=SPARSE)
    mixers = {
        i: (linear_twin if kind == "lightning-attn" else kept_attention)(
            teacher.model.layers[i].self_attn, config, "open", torch.Generator()
        )
        for i, kind in enumerate(kinds)
    }
    assert isinstance(mixers[0], LatentAttention) and not mixers[0].needs_rope
    hybrid = assemble(teacher, config, mixers)
    with swapped(teacher, mixers):
        expected = teacher(IDS, use_cache=False).logits
    torch.testing.assert_close(hybrid(IDS, use_cache=False).logits, expected)
    sparse = reconfigured(hybrid, mixer_types=[SPARSE_ROWS.get(kind, kind) for kind in kinds])
    text = sparse.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    whole = sparse(text[:, :-1], use_cache=False).logits.argmax(dim=-1)
    assert text[0, 20:].tolist() == whole[0, 19:].tolist()


@torch.no_grad()
def test_an_open_gate_changes_nothing(teacher: MiniCPMSALAForCausalLM) -> None:
    config = hybrid_config(teacher.config, ["latent-attention"] * 4, rope=True, gates=True)
    x_BTD, rows, y_BTD = watch_mixers(teacher, IDS)[0]
    opened = kept_attention(teacher.model.layers[0].self_attn, config, "open", torch.Generator())
    torch.testing.assert_close(opened(x_BTD, rows), y_BTD)
