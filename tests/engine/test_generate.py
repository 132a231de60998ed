"""An answer is the same whatever the chunks; it ends where it should; its statistics are what happened."""

import copy
import math
import shutil
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from model.shapes import tiny_model
from sala.engine import Sampling, encode_prompt, generate, load, open_checkpoint
from sala.engine.generate import end_tokens
from sala.errors import CheckpointError, InputError, MemoryLimitError
from sala.model import MiniCPMSALAForCausalLM
from sala.model.checkpoint import BUILTIN

MODEL_FILES = {"config.json", "model.safetensors", "generation_config.json"}

TEXT = "def area(radius):\n    return 3.14 * radius ** 2\n" * 4


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return encode_prompt(tokenizer, TEXT, len(tokenizer))


def answer(model, tokenizer, prompt, chunk=2048, **options):
    return generate(model, tokenizer, prompt, Sampling(**{"max_new_tokens": 12, **options}), chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunks_change_nothing(model, tokenizer, prompt, chunk):
    assert answer(model, tokenizer, prompt, chunk).tokens == answer(model, tokenizer, prompt).tokens


def test_the_answer_is_the_one_of_transformers(model, tokenizer, prompt):
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert list(answer(model, tokenizer, prompt).tokens) == expected[0, len(prompt) :].tolist()


def test_a_repetition_penalty_is_the_one_of_transformers(model, tokenizer, prompt):
    options = {"repetition_penalty": 1.8, "max_new_tokens": 12}
    expected = model.generate(torch.tensor([prompt]), do_sample=False, eos_token_id=None, **options)
    assert list(answer(model, tokenizer, prompt, **options).tokens) == expected[0, len(prompt) :].tolist()


def test_pieces_are_the_answer_and_every_token_of_the_prompt_is_counted(model, tokenizer, prompt):
    pieces, read = [], []
    result = generate(
        model, tokenizer, prompt, Sampling(max_new_tokens=9), chunk=50, on_prefill=read.append, on_text=pieces.append
    )
    assert "".join(pieces) == result.text == tokenizer.decode(result.tokens, skip_special_tokens=True)
    assert sum(read) == len(prompt) == result.statistics.prompt_tokens
    assert max(read) == 50
    assert (result.finish, result.statistics.new_tokens) == ("length", 9)


def test_statistics_are_those_of_the_run(model, tokenizer, prompt):
    statistics = answer(model, tokenizer, prompt).statistics
    assert 0 < statistics.prefill_s <= statistics.first_token_s
    assert statistics.prefill_tokens_per_s == statistics.prompt_tokens / statistics.prefill_s
    assert statistics.decode_tokens_per_s > 0
    assert statistics.cache_bytes > 0
    assert statistics.peak_bytes > 50 * 2**20


def test_one_token_needs_no_decoding(model, tokenizer, prompt):
    result = answer(model, tokenizer, prompt, max_new_tokens=1)
    assert len(result.tokens) == 1
    assert result.statistics.decode_tokens_per_s == 0


def test_a_stop_string_ends_the_answer_before_it(model, tokenizer, prompt):
    whole = answer(model, tokenizer, prompt).text
    stop = whole[4:7]
    result = answer(model, tokenizer, prompt, stop=(stop,))
    assert result.finish == "stop"
    assert result.text == whole[: whole.index(stop)]


def test_a_special_token_among_the_stop_strings_ends_the_answer(model, tokenizer, prompt, monkeypatch):
    # the text of an answer never has it, so that no string in it would stop
    pad = tokenizer.pad_token_id
    words = tokenizer("a b c", add_special_tokens=False)["input_ids"]
    drawn = [words[0], pad, *words[1:]]
    monkeypatch.setattr(import_module("sala.engine.generate"), "decode", lambda *arguments: (token for token in drawn))
    result = answer(model, tokenizer, prompt, stop=(tokenizer.pad_token, "something else"))
    assert (result.finish, result.text, result.tokens) == ("stop", "a", tuple(drawn[:2]))
    assert answer(model, tokenizer, prompt, stop=("something else",)).text == "a b c"
    with pytest.raises(InputError, match="holds the special token .*expected the token alone"):
        answer(model, tokenizer, prompt, stop=("a<|end|>",))


def test_a_chunk_longer_than_any_prompt_is_the_whole_prompt(model, tokenizer, prompt):
    assert answer(model, tokenizer, prompt, chunk=10**20).tokens == answer(model, tokenizer, prompt).tokens


def test_any_of_the_end_tokens_ends_the_answer(model, tokenizer, prompt, monkeypatch):
    tokens = answer(model, tokenizer, prompt).tokens
    monkeypatch.setattr(model.generation_config, "eos_token_id", [3, tokens[2]])
    result = answer(model, tokenizer, prompt)
    assert result.finish == "end"
    assert result.tokens == tokens[: tokens.index(tokens[2])]


def test_end_tokens_come_from_the_first_place_that_names_one(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id}
    monkeypatch.setattr(model.config, "eos_token_id", [2, 73440])
    assert end_tokens(model, tokenizer) == {2, 73440}


def test_a_checkpoint_opens_without_its_weights_and_loads_with_them(folder, model, tokenizer, prompt):
    checkpoint = open_checkpoint(folder)
    names = []
    loaded = load(checkpoint, len(prompt) + 12, 64, names.append)
    assert len(names) == checkpoint.num_tensors
    assert answer(loaded, checkpoint.tokenizer, prompt).tokens == answer(model, tokenizer, prompt).tokens


def test_weights_keep_the_checkpoint_s_precision_but_those_of_the_package(folder, monkeypatch):
    assert open_checkpoint(folder).dtype == torch.float32
    half = MiniCPMSALAForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder.parent / "half")
    shutil.copytree(folder, folder.parent / "half", dirs_exist_ok=True, ignore=lambda _, names: MODEL_FILES & {*names})
    monkeypatch.setitem(BUILTIN, "embedded-hybrid", folder.parent / "half")
    assert open_checkpoint(folder.parent / "half").dtype == torch.bfloat16
    assert open_checkpoint("embedded-hybrid").dtype == torch.float32
    # their answers are two tokens, and what follows is noise
    assert open_checkpoint("embedded-hybrid").generation.max_new_tokens == 16
    assert open_checkpoint(folder).generation.max_new_tokens is None
    assert open_checkpoint("embedded-hybrid", dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(("device", "kind"), [("cpu", "memory"), ("cuda", "GPU memory")])
def test_weights_that_do_not_fit_are_not_read(device, kind, folder, monkeypatch):
    monkeypatch.setattr("sala.engine.memory.available_bytes", lambda device: 300 * 2**20)
    names = []
    checkpoint = replace(open_checkpoint(folder), device=torch.device(device))
    with pytest.raises(MemoryLimitError, match=rf"GiB of {kind}: .* 300 MiB are available"):
        load(checkpoint, 10**7, 64, names.append)
    assert not names


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "bfloat61"}, InputError, "did you mean 'bfloat16'"),
        ({"device": "gpu"}, InputError, "device 'gpu' is not on this machine"),
        ({"device": "meta"}, InputError, "device 'meta' is not on this machine"),
        ({"device": "privateuseone"}, InputError, "device 'privateuseone' is not on this machine"),
        ({"name": "a" * 5000}, CheckpointError, "no folder or GGUF file"),
        ({"name": "~nobody-of-this-name"}, CheckpointError, "no folder or GGUF file"),
        ({"name": "nope"}, CheckpointError, "no folder or GGUF file 'nope'"),
    ],
)
def test_what_is_not_there_is_refused(options, error, message, folder):
    with pytest.raises(error, match=message):
        open_checkpoint(**{"name": folder, **options})


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}, {"repetition_penalty": 1.3}])
def test_weights_that_are_not_finite_give_no_answer(model, tokenizer, prompt, options):
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(
        CheckpointError, match=r"^the model: tensor 'model.layers.1.mlp.up_proj.weight' holds nan; expe"
    ):
        answer(broken, tokenizer, prompt, **options)


def test_logits_that_overflow_on_the_way_end_the_answer_there(model, tokenizer, prompt):
    broken, written = copy.deepcopy(model), []
    first = answer(model, tokenizer, prompt).tokens[0]
    # the embedding of the first token that is drawn, which the prompt does not hold, overflows
    assert first not in prompt
    broken.model.embed_tokens.weight.data[first] = 3e38
    with pytest.raises(CheckpointError, match="the weights are finite, and the logits computed in float32 are not"):
        generate(broken, tokenizer, prompt, Sampling(max_new_tokens=12), on_text=written.append)


def test_a_prompt_beyond_the_trained_positions_is_told(tokenizer, prompt, caplog):
    rotating = {"mixer_types": ["attention"] * 4, "attn_use_rope": True, "vocab_size": len(tokenizer)}
    for changes, told in (
        ({"max_position_embeddings": len(prompt)}, False),
        ({"max_position_embeddings": len(prompt) - 1}, True),
        ({"max_position_embeddings": 16, "attn_use_rope": False}, False),
    ):
        caplog.clear()
        answer(tiny_model(**rotating | changes), tokenizer, prompt, max_new_tokens=1)
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert bool(warnings) == told
        if told:
            assert f"has {len(prompt)} tokens, more than the {len(prompt) - 1} positions" in warnings[0]
