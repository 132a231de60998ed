"""Norms are computed within operators unless somebody would see that their modules are not called."""

from typing import Any

import pytest
import torch
from torch import nn

from model.shapes import tiny_model, tokens
from sala.model import MiniCPMSALAForCausalLM
from sala.model import norm as norm_module
from sala.model.norm import RMSNorm
from sala.model.rows import place_rows

CHANGES = {"attention_qk_norm": True, "use_output_norm": True}


def norms(model: MiniCPMSALAForCausalLM) -> dict[str, RMSNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RMSNorm)}


def add_forward_hooks(norm: nn.Module, seen: list[nn.Module]) -> None:
    norm.register_forward_hook(lambda module, *_: seen.append(module))


def add_forward_pre_hooks(norm: nn.Module, seen: list[nn.Module]) -> None:
    norm.register_forward_pre_hook(lambda module, *_: seen.append(module))


def add_backward_hooks(norm: nn.Module, seen: list[nn.Module]) -> None:
    norm.register_full_backward_hook(lambda module, *_: seen.append(module))


def replace_forward(norm: nn.Module, seen: list[nn.Module]) -> None:
    forward = norm.forward

    def watched(*args: Any) -> Any:
        seen.append(norm)
        return forward(*args)

    norm.forward = watched


@pytest.mark.parametrize("add", [add_forward_hooks, add_forward_pre_hooks, add_backward_hooks, replace_forward])
def test_every_norm_calls_its_hooks_once(add: Any) -> None:
    model, plain, ids, seen = tiny_model(**CHANGES), tiny_model(**CHANGES), tokens(1, 80), []
    for norm in norms(model).values():
        add(norm, seen)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert sorted(map(id, seen)) == sorted(map(id, norms(model).values()))
    torch.testing.assert_close(output.logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_global_hooks_see_every_norm() -> None:
    model, seen = tiny_model(**CHANGES), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    model(tokens(1, 20))
    handle.remove()
    assert {id(norm) for norm in norms(model).values()} <= set(map(id, seen))


def test_without_hooks_norms_stay_within_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = tiny_model(**CHANGES), []
    original = norm_module.rms_norm
    monkeypatch.setattr(norm_module, "rms_norm", lambda *args: called.append(args) or original(*args))
    model(tokens(1, 20))
    # the norm before each mixer, and the last: what stands at the start of no operator
    assert len(called) == len(model.model.layers) + 1


@torch.no_grad()
def test_offloaded_weights_are_there_when_they_are_used() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny_model(**CHANGES), tokens(1, 80)
    expected = model(ids).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.model.norm.weight.is_meta
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("names", [["post_attention_layernorm"], ["q_norm", "k_norm", "o_norm", "input_layernorm"]])
@pytest.mark.filterwarnings("ignore:Unsupported layer type", "ignore:`is_gradient_checkpointing`:FutureWarning")
def test_norms_are_tuned(names: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(**CHANGES), tokens(1, 80)
    expected = model(ids).logits
    tuned = peft.get_peft_model(model, peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=names))
    output = tuned(input_ids=ids, labels=ids)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-5)
    output.loss.backward()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert trained
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def test_the_places_of_tokens_go_to_the_device_of_a_layer() -> None:
    accelerate = pytest.importorskip("accelerate")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    for rows in (
        place_rows(2, 9, 0, torch.device("cpu"), mask),
        place_rows(1, 9, 0, torch.device("cpu"), cu_seqlens=torch.tensor([0, 4, 9])),
    ):
        there = accelerate.utils.send_to_device(rows, "meta")
        assert there.positions_BT.is_meta
        assert (there.ragged is None) == (rows.ragged is None)
        assert there.ragged is None or all(tensor.is_meta for tensor in there.ragged.tokens)
        assert there.packing is None or (there.packing.cu_seqlens.is_meta and rows.packing.cu_seqlens.is_cpu)
        assert accelerate.utils.send_to_device(rows, "cpu") is rows
