"""A conversation in the terminal: many turns on one engine, Ctrl-C stops the answer and not the program."""

import copy
import io
import sys

import pytest

from sala.data import load_tokenizer
from sala.engine.conversation import Conversation
from sala.errors import InputError
from sala.model.checkpoint import find_checkpoint
from serve.conftest import TEMPLATE


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_checkpoint("embedded-teacher"))


@pytest.fixture
def lines(monkeypatch):
    def give(*lines):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return give


def test_answers_are_about_the_file_and_turn_by_turn(sala, lines, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("[set] @amber @birch @cedar @delta\n[set] @olive @onyx @raven @reed\n" + "nothing here\n" * 100)
    lines("[get] @amber @birch", "/clear", "", "[get] @olive @onyx", "/quit", "never read")
    outcome = sala("chat", "--file", book, "-n", "2")
    assert outcome.code == 0
    assert outcome.out == " @cedar @delta\n @raven @reed\n"


def test_standard_input_cannot_be_the_file_too(sala):
    outcome = sala("chat", "--file", "-")
    assert outcome.code == 2 and "expected a file" in outcome.err


def test_a_later_prompt_begins_with_the_earlier_one(tokenizer):
    talk = Conversation(tokenizer, len(tokenizer), "A book.\n")
    first = talk.ask("one?")
    talk.answered(" two.")
    second = talk.ask("three?")
    assert second[: len(first)] == first
    talk.clear()
    assert talk.ask("one?") == first


def test_a_template_is_used_where_there_is_one(tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    talk = Conversation(chatty, len(tokenizer), "A book.", "Be brief.")
    talk.ask("one?")
    talk.answered("two")
    expected = "system: Be brief.\nuser: A book.\n\none?\nassistant: two\nuser: three?\nassistant:"
    assert tokenizer.decode(talk.ask("three?"), skip_special_tokens=True) == expected
    with pytest.raises(InputError, match="without a chat template"):
        Conversation(tokenizer, len(tokenizer), system="Be brief.")
