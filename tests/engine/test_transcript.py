"""Streamed text: whole characters only, exactly the decoded text, cut exactly before a stop string."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sala.engine.transcript import Transcript

TEXT = "naïve 世界 🌍🏽 — done\n\tend"


def stream(tokenizer, ids, stop=()):
    transcript = Transcript(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(transcript.add(token))
        if transcript.stopped:
            break
    pieces.append(transcript.finish())
    assert transcript.text == "".join(pieces)
    return transcript, pieces


@pytest.fixture(scope="module")
def encode(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def test_no_piece_splits_a_character(tokenizer, encode):
    transcript, pieces = stream(tokenizer, encode(TEXT))
    assert transcript.text == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5


@settings(max_examples=50)
@given(text=st.text(max_size=30))
def test_pieces_are_the_whole_text(tokenizer, encode, text):
    assert stream(tokenizer, encode(text))[0].text == text


def test_an_answer_that_ends_inside_a_character_shows_that(tokenizer, encode):
    ids = encode("a🌍")[:-1]
    assert stream(tokenizer, ids)[0].text == tokenizer.decode(ids)


@settings(max_examples=100)
@given(
    text=st.text("abAB🌍é ", max_size=20),
    stop=st.lists(st.text("abA🌍é ", min_size=1, max_size=5), min_size=1, max_size=2),
)
def test_the_text_ends_right_before_the_first_stop_string(tokenizer, encode, text, stop):
    transcript, _ = stream(tokenizer, encode(text), stop)
    ends = [text.find(word) for word in stop if word in text]
    assert transcript.stopped == bool(ends)
    if not ends:
        assert transcript.text == text
    else:
        assert not any(word in transcript.text for word in stop)
        assert text.startswith(transcript.text)
        assert any(text[len(transcript.text) :].startswith(word) for word in stop)


def test_a_stop_string_may_span_tokens_and_nothing_of_it_is_shown(tokenizer, encode):
    ids = encode("one STOP two")
    assert len(encode("STOP")) > 1
    transcript, pieces = stream(tokenizer, ids, ["STOP"])
    assert "".join(pieces) == "one "
    assert transcript.stopped


def test_the_start_of_a_stop_string_is_shown_once_it_is_none(tokenizer, encode):
    assert stream(tokenizer, encode("a STOx b ST"), ["STOP"])[0].text == "a STOx b ST"
