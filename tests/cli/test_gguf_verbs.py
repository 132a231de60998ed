"""A GGUF file is a checkpoint for every verb."""

import json

import pytest
import torch

from data.test_gguf_tokenizer import tokenizer_keys
from model.gguf_files import write_gguf
from sala.data import load_tokenizer
from sala.model.families import load_model

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def file(teacher, tmp_path_factory):
    """The tiny teacher of the other tests, with its tokenizer."""
    tokenizer = load_tokenizer(teacher)
    keys = {**tokenizer_keys(tokenizer.backend_tokenizer), "tokenizer.ggml.pre": "gpt-2"}
    keys |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id}
    keys["tokenizer.chat_template"] = TEMPLATE
    return write_gguf(tmp_path_factory.mktemp("gguf") / "teacher.gguf", load_model(teacher), "BF16", keys=keys)


def test_it_is_the_folder_it_was_written_from(sala, file, teacher, tmp_path):
    load_model(teacher, dtype=torch.bfloat16).save_pretrained(tmp_path / "folder")
    load_tokenizer(teacher).save_pretrained(tmp_path / "folder")
    asked = ("--prompt", "[get] @amber @birch import os", "-n", "5")
    answers = [sala("generate", "--model", model, *asked).out for model in (file, tmp_path / "folder")]
    assert answers[0] == answers[1] != ""
    mine, theirs = (json.loads(sala("inspect", model, "--json").out) for model in (file, tmp_path / "folder"))
    same = ("dtype", "mixer_types", "parameters", "cache_bytes")
    assert [mine[fact] for fact in same] == [theirs[fact] for fact in same]
    assert sala("plan", "--model", file, "--length", "1K").code == 0
    assert sala("generate", "--model", file, "--chat", *asked).code == 0


def test_it_is_a_teacher_and_what_it_becomes_has_its_tokenizer(sala, file, tmp_path):
    uniform = ("--set", "conversion.keep.method=uniform")
    outcome = sala("convert", "--teacher", file, "--recipe", "smoke", "--out", tmp_path / "out", *uniform)
    assert outcome.code == 0, outcome.err
    hybrid = outcome.out.strip()
    assert load_tokenizer(hybrid).chat_template == TEMPLATE
    assert load_model(hybrid).dtype == load_model(file).dtype == torch.bfloat16
    assert load_tokenizer(hybrid)("x = 1").input_ids == load_tokenizer(file)("x = 1").input_ids
    assert sala("generate", "--model", hybrid, "--prompt", "x", "-n", "3").code == 0


def test_a_run_that_started_from_it_goes_on_and_is_exported(sala, file, tmp_path):
    smoke = ("train", "smoke", "--teacher", file, "--out", tmp_path / "run", "--set", "conversion.keep.method=uniform")
    assert sala(*smoke, "--save-every", "1").code == 0
    assert sala("train", "export", tmp_path / "run", "--out", tmp_path / "exported").code == 0
    assert load_model(tmp_path / "exported").config.mixer_types.count("minicpm4") == 1


def test_its_tokenizer_writes_shards(sala, file, tmp_path):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 50)
    outcome = sala("data", tmp_path / "text.txt", "--tokenizer", file, "--out", tmp_path / "shards")
    assert outcome.code == 0, outcome.err
