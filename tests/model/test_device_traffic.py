"""Laws of what passes between the CPU and a GPU in a forward pass, seen without a GPU."""

import pytest
import torch

from absent_card import CARD, absent_card
from model.shapes import tiny_config
from sala.model import MiniCPMSALAForCausalLM, new_cache

KINDS = {
    "hybrid": {},
    "exact": {"mixer_types": ["minicpm4", "lightning-attn"] * 2, "lightning_nkv": 2},
    "attention": {"mixer_types": ["attention"] * 4, "attn_use_rope": True, "attention_qk_norm": True},
    "scaled-logits": {"attn_logits_scaling": 20},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def model_on_card(kind: str) -> MiniCPMSALAForCausalLM:
    with CARD:
        return MiniCPMSALAForCausalLM(tiny_config(**KINDS[kind])).eval()


def ids_on_card(batch: int, length: int) -> torch.Tensor:
    return torch.empty(batch, length, dtype=torch.long, device=CARD)


def test_what_is_asked_of_a_card_and_sent_to_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with absent_card(monkeypatch) as card:
        x = torch.ones(3, 4, device=CARD)
        for question in (lambda: int(x.max()), lambda: x.tolist(), lambda: bool((x > 0).all()), lambda: x.cpu()):
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                question()
        with pytest.raises(NotImplementedError, match="nonzero"):
            (x > 0).nonzero()
        assert card.sent == []
        torch.tensor([1.0, 2.0], device=CARD)
        x.copy_(torch.ones(4))
        torch.arange(8).to(CARD, non_blocking=True)
        assert card.sent == [8, 16, 64]


@every_kind
@pytest.mark.parametrize("chunk", [40, 300])
def test_prefill_and_steps_send_and_ask_nothing(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with absent_card(monkeypatch) as card, torch.inference_mode():
        model, ids = model_on_card(kind), ids_on_card(2, 302)
        cache = new_cache(model.config)
        card.sent.clear()
        for part in (*ids[:, :300].split(chunk, dim=1), *ids[:, 300:].split(1, dim=1)):
            model(part, cache=cache, logits_to_keep=1)
        assert card.sent == []


@every_kind
def test_a_padded_batch_sends_its_mask_once_a_call(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with absent_card(monkeypatch) as card, torch.inference_mode():
        model, ids = model_on_card(kind), ids_on_card(2, 141)
        mask = torch.ones(2, 141, dtype=torch.bool)
        mask[1, :80] = False
        cache = new_cache(model.config)
        for start, end in ((0, 70), (70, 140), (140, 141)):
            card.sent.clear()
            model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache, logits_to_keep=1)
            assert card.sent == [2 * end]


@every_kind
def test_a_packed_training_step_sends_where_documents_end(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with absent_card(monkeypatch) as card:
        model, ids = model_on_card(kind).train(), ids_on_card(1, 300)
        ends = torch.tensor([0, 7, 120, 126, 300])
        card.sent.clear()
        model(ids, cu_seqlens=ends).logits.sum().backward()
        assert card.sent == [ends.nbytes]


@pytest.mark.parametrize("op", ["pointwise", "lightning", "infllm"])
def test_the_kernels_for_gpus_are_what_runs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with absent_card(monkeypatch) as card, torch.inference_mode():
        model_on_card("hybrid")(ids_on_card(1, 300), logits_to_keep=1)
    launches = {"pointwise": "pointwise_triton", "lightning": "lightning_scan", "infllm": "infllm_triton_attend"}
    assert any(name.startswith(f"sala::{launches[op]}") for name in card.launched)
