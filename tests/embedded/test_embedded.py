"""What ships does what its card says, and stays small."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sala  # noqa: F401 - registers the model
from sala.cli import main
from sala.data import encode_documents, library_documents, load_tokenizer, vocabulary
from sala.eval import retrieval
from sala.model.checkpoint import BUILTIN
from sala.model.families import load_model


def accuracy(name: str, haystack: str, length: int, questions: int) -> float:
    tokenizer = load_tokenizer(BUILTIN[name])
    text = encode_documents(tokenizer, library_documents("test")[:20])
    point = retrieval(
        load_model(name), vocabulary(tokenizer), haystack=haystack, length=length, text=text, questions=questions
    )
    return point.accuracy


def test_the_readme_s_question_is_answered(capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    [(command, answer)] = re.findall(r"^    sala (generate .*?) +# (.*)$", readme, re.MULTILINE)
    with pytest.raises(SystemExit) as leaving:
        main(shlex.split(command))
    assert leaving.value.code == 0
    assert capsys.readouterr().out.strip() == answer == "@cedar @delta"


def test_both_are_small():
    assert sum(file.stat().st_size for folder in BUILTIN.values() for file in folder.iterdir()) < 16 * 2**20


def test_the_teacher_retrieves_where_it_was_trained_and_not_beyond():
    assert accuracy("embedded-teacher", "text", 512, 128) > 0.9
    assert accuracy("embedded-teacher", "text", 4096, 32) < 0.7


def test_the_hybrid_retrieves_far_beyond():
    assert accuracy("embedded-hybrid", "text", 4096, 32) > 0.9
    assert accuracy("embedded-hybrid", "noise", 4096, 32) > 0.85


def test_the_hybrid_answers_through_transformers_alone():
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN["embedded-hybrid"])
    model = AutoModelForCausalLM.from_pretrained(BUILTIN["embedded-hybrid"])
    assert model.dtype == torch.float32
    text = "import os\n[set] @amber @birch @cedar @delta\n" + "def read(path):\n    return open(path).read()\n" * 60
    inputs = tokenizer(text + "[get] @amber @birch", return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(written).split() == ["@cedar", "@delta"]
