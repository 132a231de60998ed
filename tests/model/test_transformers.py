"""The model is a citizen of transformers: Auto classes, generate, save and load, PEFT, checkpointing."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sala
from model.shapes import tiny_config, tiny_model, tokens
from sala.errors import InputError
from sala.model import MiniCPMSALAForCausalLM, new_cache
from sala.model.interface import named

GREEDY = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid")
    tiny_model().save_pretrained(path)
    return path


def greedy(model, ids, steps):
    """The likeliest tokens one by one, each from a forward pass over everything."""
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def left_padded(lengths):
    rows, ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long), tokens(len(lengths), max(lengths))
    mask = torch.zeros_like(rows)
    for row, length in enumerate(lengths):
        rows[row, -length:], mask[row, -length:] = ids[row, :length], 1
    return rows, mask, [ids[row : row + 1, :length] for row, length in enumerate(lengths)]


def test_auto_classes_load_what_was_saved(folder):
    assert isinstance(AutoConfig.from_pretrained(folder), sala.MiniCPMSALAConfig)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded, MiniCPMSALAForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens(1, 70)).logits, tiny_model()(tokens(1, 70)).logits)


def test_generate_takes_the_likeliest_tokens(folder):
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), tokens(1, 75)
    assert model.generate(ids, **GREEDY).tolist() == greedy(model, ids, 20).tolist()


def test_a_left_padded_batch_generates_what_its_rows_do_alone():
    model = tiny_model()
    rows, mask, alone = left_padded([80, 9, 41])
    together = model.generate(rows, attention_mask=mask, **GREEDY)[:, 80:]
    for row, ids in enumerate(alone):
        assert together[row].tolist() == model.generate(ids, **GREEDY)[0, ids.shape[1] :].tolist()


def test_a_chunked_prefill_generates_the_same():
    model, ids = tiny_model(), tokens(2, 100)
    whole = model.generate(ids, **GREEDY)
    assert model.generate(ids, prefill_chunk_size=16, **GREEDY).tolist() == whole.tolist()


@pytest.mark.parametrize("mode", [{}, {"prefill_chunk_size": 16}, {"num_beams": 2}])
def test_no_logits_are_made_of_a_prompt_but_its_last(mode):
    model, positions = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: positions.append(logits.shape[1]))
    model.generate(tokens(2, 70), **{**GREEDY, "max_new_tokens": 3}, **mode)
    assert set(positions) == {1}


def test_a_cache_goes_on_where_it_ended():
    model, ids = tiny_model(), tokens(1, 90)
    cache = new_cache(model.config)
    first = model.generate(ids, **named(cache), **GREEDY)
    # the last token of an answer is in the text but not in the cache yet
    longer = torch.cat([first, tokens(1, 7, seed=1)], dim=1)
    again = model.generate(longer, **named(cache), **GREEDY)
    assert again.tolist() == model.generate(longer, **GREEDY).tolist()


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_score_no_worse_than_one_greedy_answer(mode):
    model, ids = tiny_model(), tokens(2, 70)

    def log_probability(answers):
        with torch.no_grad():
            log_probs = model(answers[:, :-1]).logits.log_softmax(-1)
        return log_probs.gather(-1, answers[:, 1:, None])[:, 69:, 0].sum(1)

    found = model.generate(ids, **GREEDY, **mode)
    best = found[:: mode.get("num_return_sequences", 1)]
    assert len(found) == 2 * mode.get("num_return_sequences", 1)
    assert torch.all(log_probability(best) >= log_probability(model.generate(ids, **GREEDY)) - 1e-4)


def test_several_answers_to_one_prompt_are_drawn():
    answers = tiny_model().generate(tokens(1, 70), do_sample=True, num_return_sequences=3, max_new_tokens=12)
    assert len(answers) == 3
    assert len({tuple(row.tolist()) for row in answers}) > 1


@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_changes_no_number_and_no_name(tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for loaded in (MiniCPMSALAForCausalLM.from_pretrained(tmp_path).eval(), sala.load_model(tmp_path)):
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert loaded.config.mixer_types == model.config.mixer_types
        with torch.no_grad():
            assert torch.equal(loaded(tokens(1, 70)).logits, model(tokens(1, 70)).logits)


def test_a_bfloat16_checkpoint_stays_one(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(tokens(1, 70)).logits.dtype == torch.float32


def test_lora_trains_and_merges():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model(), tokens(2, 70)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, adapter)
    before = wrapped(ids, labels=ids).loss
    before.backward()
    moved = [p for p in wrapped.parameters() if p.requires_grad]
    assert moved
    assert all(p.grad is not None for p in moved)
    torch.optim.AdamW(moved, lr=1e-2).step()
    wrapped.eval()
    with torch.no_grad():
        trained = wrapped(ids, labels=ids)
        merged = wrapped.merge_and_unload()(ids, labels=ids)
    assert trained.loss < before
    assert isinstance(wrapped.merge_and_unload(), MiniCPMSALAForCausalLM)
    torch.testing.assert_close(merged.logits, trained.logits, atol=2e-4, rtol=1e-4)


def test_labels_give_the_loss_of_the_next_token():
    model, ids = tiny_model(), tokens(2, 40)
    labels = ids.clone()
    labels[:, :10] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
        expected = torch.nn.functional.cross_entropy(output.logits[:, 9:-1].flatten(0, 1), ids[:, 10:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_hidden_states_are_those_of_every_layer():
    model, ids = tiny_model(), tokens(1, 20)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(model.logits(output.hidden_states[-1]), output.logits)


def test_the_configuration_says_what_is_returned_where_a_call_does_not(folder):
    model, ids = AutoModelForCausalLM.from_pretrained(folder, output_hidden_states=True), tokens(1, 9)
    for net in (model, model.model):
        assert len(net(ids).hidden_states) == model.config.num_hidden_layers + 1
        assert net(ids, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    for net in (model, model.model):
        assert isinstance(net(ids), tuple)
        assert not isinstance(net(ids, return_dict=True), tuple)


def test_attention_weights_are_refused():
    model = tiny_model()
    for net in (model, model.model):
        net(tokens(1, 5), output_attentions=False)
        with pytest.raises(InputError, match="output_attentions"):
            net(tokens(1, 5), output_attentions=True)


def test_what_callers_pass_to_every_model_changes_nothing():
    model, ids = tiny_model(), tokens(1, 20)
    extra = {"token_type_ids": torch.zeros_like(ids), "num_items_in_batch": None, "is_causal": True}
    with torch.no_grad():
        for net in (model, model.model):
            assert torch.equal(net(ids, **extra)[0], net(ids)[0])


def test_what_would_change_the_numbers_is_refused():
    with pytest.raises(InputError, match="is_causal"):
        tiny_model()(tokens(1, 20), is_causal=False)


def test_the_configuration_survives_a_round_trip(tmp_path):
    config = tiny_config(attn_logits_scaling=500, attention_qk_norm=True)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
