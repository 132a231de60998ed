"""`generate` with padding on either side, and going on from a cache."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen3Config

from model.shapes import tiny_model, tokens
from sala.errors import InputError
from sala.model import MiniCPMSALAForCausalLM, SalaCache, new_cache
from sala.model.interface import named

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
LENGTHS = (70, 9, 41)


def alone(model: MiniCPMSALAForCausalLM, ids: Tensor) -> list[int]:
    return model.generate(ids[None], **GREEDY)[0, len(ids) :].tolist()


def read(model: MiniCPMSALAForCausalLM, ids: Tensor) -> SalaCache:
    cache = new_cache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    return cache


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", [{}, {"prefill_chunk_size": 16}, {"num_beams": 2}])
@pytest.mark.parametrize("name", ["inputs", "input_ids", "inputs_embeds"])
def test_a_padded_batch_answers_as_its_rows_alone(side: str, mode: dict[str, int], name: str) -> None:
    if name == "inputs_embeds" and "prefill_chunk_size" in mode:
        pytest.skip("transformers reads embeddings in one piece")
    model, ids = tiny_model(), tokens(3, 70)
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(70 - length, None) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = ids[row, :length], 1
    prompt = model.model.embed_tokens(padded) if name == "inputs_embeds" else padded
    answers = model.generate(**{name: prompt}, attention_mask=mask, **GREEDY, **mode)[:, -8:].tolist()
    for row, length in enumerate(LENGTHS):
        expected = model.generate(ids[row : row + 1, :length], **GREEDY, num_beams=mode.get("num_beams", 1))
        assert answers[row] == expected[0, length:].tolist()


def test_a_prompt_padded_on_the_right_comes_back_padded_on_the_left() -> None:
    model, ids = tiny_model(), tokens(1, 5)
    padded, mask = torch.nn.functional.pad(ids, (0, 2)), torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    answer = model.generate(padded, attention_mask=mask, **GREEDY)
    assert answer[0, :7].tolist() == [0, 0, *ids[0].tolist()]


@torch.no_grad()
def test_an_empty_row_changes_nothing_for_the_others() -> None:
    model, ids = tiny_model(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1] = 0
    answers = model.generate(ids, attention_mask=mask, **GREEDY)
    assert answers[0, 30:].tolist() == alone(model, ids[0])
    for use_cache in (True, False):
        logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[:1], model(ids[:1]).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_an_answer_goes_on_from_a_cache(name: str) -> None:
    model, ids = tiny_model(), tokens(2, 90)
    answer = model.generate(ids, **{name: read(model, ids[:, :60])}, **GREEDY)
    assert answer.tolist() == model.generate(ids, **GREEDY).tolist()


def test_new_tokens_alone_go_on_where_a_mask_covers_the_whole_text() -> None:
    model, ids = tiny_model(), tokens(2, 90)
    answer = model.generate(ids[:, 60:], cache=read(model, ids[:, :60]), attention_mask=torch.ones_like(ids), **GREEDY)
    assert answer[:, 30:].tolist() == model.generate(ids, **GREEDY)[:, 90:].tolist()


@pytest.mark.parametrize("mode", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_cache_is_repeated_for_several_answers(mode: dict[str, int]) -> None:
    model, ids = tiny_model(), tokens(2, 90)
    expected = model.generate(ids, **GREEDY, **mode)
    assert model.generate(ids, cache=read(model, ids[:, :60]), **GREEDY, **mode).tolist() == expected.tolist()


def test_several_answers_are_drawn_from_one_cache() -> None:
    model, ids, settings = tiny_model(), tokens(1, 90), {**GREEDY, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    expected = model.generate(ids, **settings)
    torch.manual_seed(0)
    assert model.generate(ids, cache=read(model, ids[:, :60]), **settings).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (lambda ids: ids[:, :60], "a prompt of 60 tokens with a cache that has read 60"),
        (lambda ids: ids[:, :40], "a prompt of 40 tokens with a cache that has read 60"),
        (lambda ids: torch.cat([ids[:, :7], tokens(2, 83, seed=1)], dim=1), r"another text: its token \d+ of row \d"),
        (lambda ids: ids[:1], "a batch of 1 with a cache of 2 rows"),
    ],
)
def test_a_prompt_that_a_cache_does_not_begin_is_refused(prompt: Any, message: str) -> None:
    model, ids = tiny_model(), tokens(2, 90)
    with pytest.raises(InputError, match=message):
        model.generate(prompt(ids), cache=read(model, ids[:, :60]), **GREEDY)


def test_a_rewound_and_reordered_cache_knows_its_text() -> None:
    model, ids = tiny_model(), tokens(2, 90)
    cache = read(model, ids[:, :40])
    mark = cache.mark()
    with torch.no_grad():
        model(tokens(2, 9, seed=1), cache=cache)
    cache.rewind(mark)
    assert cache.seen.tokens().tolist() == ids[:, :40].tolist()
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(InputError, match="another text"):
        model.generate(ids, cache=cache, **GREEDY)
    assert model.generate(ids.flip(0), cache=cache, **GREEDY).tolist() == model.generate(ids.flip(0), **GREEDY).tolist()


def test_positions_are_taken_where_they_are_a_count() -> None:
    model, ids = tiny_model(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    assert model.generate(ids, attention_mask=mask, position_ids=positions, **GREEDY).tolist() == expected.tolist()
    for other in (positions + 1, torch.arange(30).expand(2, -1)):
        with pytest.raises(InputError, match="position_ids are no count"):
            model.generate(ids, attention_mask=mask, position_ids=other, **GREEDY)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
def test_as_an_assistant_it_is_refused_before_the_first_token(config: Any) -> None:
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    main = AutoModelForCausalLM.from_config(config(**fields, num_attention_heads=2, num_key_value_heads=2))
    calls: list[Any] = []
    main.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(InputError, match="as assistant_model"):
        main.generate(tokens(1, 20), assistant_model=tiny_model(), **GREEDY)
    assert not calls


def test_drafts_that_need_a_cache_cut_back_are_refused() -> None:
    model, ids = tiny_model(), tokens(1, 30)
    for draft in ({"assistant_model": copy.deepcopy(model)}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match=r"stateful|not supported"):
            model.generate(ids, **GREEDY, **draft)


def test_another_kind_of_cache_is_refused() -> None:
    model, ids = tiny_model(), tokens(1, 30)
    with pytest.raises(InputError, match="its own"):
        model.generate(ids, cache_implementation="static", **GREEDY)
    with pytest.raises(InputError, match="expected a SalaCache"):
        model.generate(ids, **named(DynamicCache()), **GREEDY)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_prefix_tuning_is_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    # one number of heads and one width, as it asks for
    model, ids = tiny_model(num_key_value_heads=4, head_dim=8, mixer_types=["attention"] * 4), tokens(1, 30)
    tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    for call in (lambda: tuned(input_ids=ids, labels=ids), lambda: tuned.generate(input_ids=ids, **GREEDY)):
        with pytest.raises(InputError, match="Prefix tuning"):
            call()
