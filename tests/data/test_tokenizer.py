"""Laws of the tokenizer."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sala.data import Document, Vocabulary, encode_documents, load_tokenizer, train_tokenizer, vocabulary
from sala.data.tokenizer import CONTROLS, SYMBOLS
from sala.errors import CheckpointError, InputError


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_decodes_to_itself(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_every_byte_has_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(chr(code) for code in range(0x800)) + "\u20ac\U0001f600\x00"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.unk_token is None


def test_a_typed_line_has_one_token_a_word(tokenizer: PreTrainedTokenizerFast, words: Vocabulary) -> None:
    typed = "[set] @amber @birch @cedar @delta"
    ids = tokenizer(typed)["input_ids"]
    assert ids[:2] == [words.begin, words.set]
    assert len(ids) == 6
    assert tokenizer.decode(ids, skip_special_tokens=True) == typed


def test_symbols_and_controls_are_different_single_tokens(words: Vocabulary) -> None:
    ids = {words.begin, words.end, words.pad, words.set, words.get, words.let, words.copy, *words.symbols}
    assert len(ids) == 3 + len(CONTROLS) + len(SYMBOLS) == 135


def test_the_shipped_tokenizer_loads_as_a_checkpoints_does(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    sample = "def f():\n\treturn [get] @owl @zinc"
    assert loaded(sample)["input_ids"] == tokenizer(sample)["input_ids"]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1024, 1025, 1026)
    assert loaded.padding_side == "left"


def test_training_twice_gives_the_same_tokenizer() -> None:
    documents = [Document("a", "for i in range(10): print(i)\n" * 20)]
    first, second = (train_tokenizer(documents, 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_documents_end_with_the_end_token(tokenizer: PreTrainedTokenizerFast, words: Vocabulary) -> None:
    stream = encode_documents(tokenizer, [Document("a", "x = 1"), Document("b", "y")])
    assert stream.dtype == np.int64
    assert np.count_nonzero(stream == words.end) == 2
    assert stream[-1] == words.end
    assert words.begin not in stream


def test_a_tokenizer_without_task_words_is_refused() -> None:
    plain = train_tokenizer([Document("a", "plain")], 256)
    plain = PreTrainedTokenizerFast(tokenizer_object=type(plain.backend_tokenizer)(plain.backend_tokenizer.model))
    with pytest.raises(InputError, match="lacks 135 task words"):
        vocabulary(plain)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{"), ("tokenizer.json", "{}"), ("tokenizer_config.json", "[1]")],
)
def test_a_damaged_tokenizer_is_refused(
    name: str, content: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot be read .*; expected whole tokenizer\.json"):
        load_tokenizer(tmp_path)
