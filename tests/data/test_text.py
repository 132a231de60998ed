"""Laws of text as tokens: what a text spells out is text, in every kind of tokenizer; all else is as the tokenizer has it."""

from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sala.data.text import TextEncoder, around, read_as_text
from sala.errors import CheckpointError

LETTERS = sorted(set("abcdefghijklmnopqrstuvwxyz </s>[]EP\n0123456789|_-."))
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BEGIN, END, UNKNOWN],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a token and a word", "</s> s> </"] * 9, trainer)
    return tokenizer


def merging(**options: object) -> Tokenizer:
    """As Llama 2's, made from a SentencePiece model by somebody who kept the merges that write `</s>`."""
    pieces = [BEGIN, END, UNKNOWN, "\u2581", *(letter for letter in LETTERS if not letter.isspace()), "</", "s>", "<s"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("<", "s"), ("<s", ">")]
    model = models.BPE(vocabulary, merges, unk_token=UNKNOWN, fuse_unk=True, **options)  # type: ignore[arg-type]
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def unigram() -> Tokenizer:
    scores = [(UNKNOWN, 0.0), (BEGIN, 0.0), (END, 0.0), ("\u2581", -2.0)]
    pieces = [(letter, -3.0) for letter in LETTERS if not letter.isspace()]
    tokenizer = Tokenizer(models.Unigram([*scores, *pieces], unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def words() -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate([UNKNOWN, BEGIN, END, "a", "b", "word"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def word_pieces() -> Tokenizer:
    letters = [letter for letter in LETTERS if not letter.isspace()]
    pieces = [UNKNOWN, BEGIN, END, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True, lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS: Mapping[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "BPE with merges to a special token": merging,
    "BPE that takes whole words": lambda: merging(ignore_merges=True),
    "Unigram": unigram,
    "WordLevel": words,
    "WordPiece": word_pieces,
}


def fast(backend: Tokenizer, **flags: bool) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, special=True, **flags) for token in (BEGIN, END, UNKNOWN)])
    backend.add_tokens([AddedToken("[P]", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN)


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return fast(KINDS[request.param](), normalized=False)


def special_ids(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.convert_tokens_to_ids([BEGIN, END])]


TEXTS = st.lists(
    st.sampled_from([BEGIN, END, "<", "/", "s", ">", "s>", "</", " ", "a", "word", "[P]", "\n", "\uff1c"]), max_size=12
).map("".join)


@given(text=TEXTS)
def test_no_text_is_a_special_token(any_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    encoder = TextEncoder(any_tokenizer)
    (batched,) = encoder.encode_batch([text])
    assert special_ids(any_tokenizer, batched.ids) == []
    assert encoder.encode(text) == batched.ids
    assert encoder.count(text) == text.count(BEGIN) + text.count(END)


@given(text=TEXTS)
def test_a_text_without_special_tokens_is_as_the_tokenizer_has_it(
    any_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    text = text.replace("s>", "s >").replace("\uff1c", "")
    encoder = TextEncoder(any_tokenizer)
    assert encoder.encode(text) == any_tokenizer(text, add_special_tokens=False)["input_ids"]
    (encoding,) = encoder.encode_batch([text], offsets=True)
    assert encoding.ids == encoder.encode(text)
    assert encoder.count(text) == 0


@pytest.mark.parametrize("flags", [{}, {"normalized": True}, {"lstrip": True, "rstrip": True}, {"lstrip": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_template_writes_is_special_and_what_stands_between_is_text(kind: str, flags: dict[str, bool]) -> None:
    tokenizer = fast(KINDS[kind](), **{"normalized": False, **flags})
    encoder = TextEncoder(tokenizer)
    hidden, count = encoder.hide([f"a {END} b", {f"{BEGIN}": (1, END)}])
    assert count == 3
    text = encoder.swap(f"{BEGIN} {hidden[0]} {END}word")
    ids = encoder.encode(text)
    begin, end = tokenizer.convert_tokens_to_ids([BEGIN, END])
    assert special_ids(tokenizer, ids) == [begin, end]
    assert encoder.encode_batch([text], offsets=True)[0].ids == ids
    # of a text that spells nothing out the ids are the tokenizer's own, to the space beside a special token
    same = f"{BEGIN} a b {END}word {END}"
    plain = encoder.encode_batch([encoder.swap(same)])[0].ids
    assert plain == tokenizer(same, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_positions_in_a_text_stay_what_they_are(kind: str) -> None:
    encoder = TextEncoder(fast(KINDS[kind]()))
    text = f"a{END}b{BEGIN}"
    hidden, _ = encoder.hide(text)
    assert len(hidden) == len(text)
    assert hidden != text
    assert encoder.swap(hidden) == text


def test_words_of_the_embedded_models_are_no_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    line = "[set] @amber @birch [get] @amber"
    encoder = TextEncoder(tokenizer)
    expected = ["[set]", " @amber", " @birch", " ", "[get]", " @amber"]
    assert [tokenizer.decode([i]) for i in encoder.encode(line)] == expected
    assert [tokenizer.decode([i]) for i in encoder.encode_batch([f"{line}<|end|>"])[0].ids[:6]] == expected
    assert encoder.count(line) == 0


def test_special_tokens_are_special_when_asked_for(any_tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"a {END} b{BEGIN}"
    encoder = TextEncoder(any_tokenizer, parse_special=True)
    assert encoder.encode(text) == any_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoder.encode_batch([text])[0].ids == encoder.encode(text)
    assert encoder.count(text) == 0
    assert encoder.hide([text]) == ([text], 0)


def test_names_differ_from_process_to_process() -> None:
    # else a text could spell the names
    first, second = (TextEncoder(fast(byte_level())).hide(END)[0] for _ in range(2))
    assert first != second


def test_the_tokens_around_a_text_are_the_tokenizer_s(any_tokenizer: PreTrainedTokenizerFast) -> None:
    begin, end = any_tokenizer.convert_tokens_to_ids([BEGIN, END])
    assert around(any_tokenizer) == ([], [])
    backend = Tokenizer.from_str(any_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, begin), (END, end)]
    )
    assert around(PreTrainedTokenizerFast(tokenizer_object=backend)) == ([begin], [end])


def test_a_tokenizer_without_tokenizer_json_is_refused() -> None:
    with pytest.raises(CheckpointError, match="expected a fast tokenizer"):
        TextEncoder(object())  # type: ignore[arg-type]


def test_one_token_and_many_are_told_in_a_line() -> None:
    assert read_as_text(1) == "1 special token spelled out in the text was read as text"
    assert read_as_text(3000) == "3,000 special tokens spelled out in the text were read as text"
