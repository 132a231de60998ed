"""Laws of the generated tasks."""

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sala.data import TASKS, Vocabulary, retrieval_document
from sala.data.tasks import ANSWER_WEIGHT, Haystack, Window, copy_window, pairs, text_slice
from sala.errors import InputError

Ints = NDArray[np.int64]
LENGTHS = st.integers(32, 200)
SEEDS = st.integers(0, 2**32 - 1)


def items(tokens: Ints, words: Vocabulary, marker: int) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Return (start, key, value) as token ids of every item that begins with `marker`."""
    starts = np.flatnonzero(tokens == marker)
    return [(int(s), tuple(tokens[s + 1 : s + 3].tolist()), tuple(tokens[s + 3 : s + 5].tolist())) for s in starts]


def is_held_out(words: Vocabulary, role: Literal["key", "value"], pair: tuple[int, ...]) -> bool:
    return bool((pairs(role, True) == np.array(pair) - words.symbols[0]).all(axis=1).any())


def window(task: str, seed: int, length: int, words: Vocabulary, text: Ints) -> Window:
    return TASKS[task](np.random.default_rng(seed), length, words, text)


@pytest.mark.parametrize("role", ["key", "value"])
def test_held_out_pairs_are_a_fifth_and_never_train(role: Literal["key", "value"]) -> None:
    train, held_out = pairs(role, False), pairs(role, True)
    assert {tuple(p) for p in train}.isdisjoint({tuple(p) for p in held_out})
    assert len(train) + len(held_out) == 128**2
    assert 0.19 < len(held_out) / 128**2 < 0.21


@pytest.mark.parametrize("task", ["text_retrieval", "noise_retrieval", "similar_keys"])
@settings(max_examples=25)
@given(seed=SEEDS, length=LENGTHS)
def test_held_out_keys_and_values_are_never_in_training_windows(
    words: Vocabulary, text: Ints, task: str, seed: int, length: int
) -> None:
    tokens = window(task, seed, length, words, text).tokens
    for marker in (words.set, words.get):
        for _, key, value in items(tokens, words, marker):
            assert not is_held_out(words, "key", key)
            assert not is_held_out(words, "value", value)


@pytest.mark.parametrize("task", ["text_retrieval", "noise_retrieval", "similar_keys"])
@settings(max_examples=25)
@given(seed=SEEDS, length=LENGTHS)
def test_every_key_is_set_once_and_asked_once_later(
    words: Vocabulary, text: Ints, task: str, seed: int, length: int
) -> None:
    made = window(task, seed, length, words, text)
    stored = items(made.tokens, words, words.set)
    asked = items(made.tokens, words, words.get)
    assert {key for _, key, _ in stored} == {key for _, key, _ in asked}
    assert len(stored) == len(asked) == len({key for _, key, _ in stored})
    for start, key, value in asked:
        (needle,) = [item for item in stored if item[1] == key]
        assert needle[0] < start
        assert needle[2] == value
        assert (made.loss_weights[start + 3 : start + 5] == ANSWER_WEIGHT).all()
        assert not made.loss_weights[needle[0] + 3 : needle[0] + 5].any()


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=25)
@given(seed=SEEDS, length=LENGTHS)
def test_a_window_is_full_begins_and_asks_for_something(
    words: Vocabulary, text: Ints, task: str, seed: int, length: int
) -> None:
    made = window(task, seed, length, words, text)
    assert made.tokens.shape == made.loss_weights.shape == (length,)
    assert made.tokens.dtype == np.int64
    assert made.tokens[0] == words.begin
    assert made.loss_weights[0] == 0
    assert made.loss_weights.sum() > 0
    assert made.tokens.min() >= 0
    assert made.tokens.max() <= words.symbols.max()


@settings(max_examples=25)
@given(seed=SEEDS, length=LENGTHS)
def test_a_weighed_copy_was_seen_one_segment_before(words: Vocabulary, seed: int, length: int) -> None:
    made = copy_window(np.random.default_rng(seed), length, words)
    body = made.tokens[2:]
    size = next(s for s in range(2, len(body)) if (body[s:] == body[:-s]).all())
    # a segment can be periodic itself, so its true size is a multiple of the smallest one
    assert np.flatnonzero(made.loss_weights)[0] >= 2 + size


@settings(max_examples=25)
@given(seed=SEEDS, length=LENGTHS)
def test_the_last_variable_has_the_value_its_chain_began_with(
    words: Vocabulary, text: Ints, seed: int, length: int
) -> None:
    tokens = window("variable_tracking", seed, length, words, text).tokens
    assigned = {int(tokens[i + 1]): int(tokens[i + 2]) for i in np.flatnonzero(tokens == words.let)}
    for i in np.flatnonzero(tokens == words.get):
        value = int(tokens[i + 1])
        while value in assigned:
            value = assigned[value]
        assert value == tokens[i + 2]


@pytest.mark.parametrize("haystack", ["text", "noise"])
@settings(max_examples=25)
@given(seed=SEEDS, num_needles=st.integers(1, 16), extra=st.integers(0, 300), data=st.data())
def test_every_answer_follows_its_question_and_its_needle(
    words: Vocabulary, text: Ints, haystack: Haystack, seed: int, num_needles: int, extra: int, data: st.DataObject
) -> None:
    num_questions = data.draw(st.integers(1, num_needles))
    length = 1 + 5 * (num_needles + num_questions) + extra
    document = retrieval_document(
        length, haystack=haystack, seed=seed, vocabulary=words, text=text,
        num_needles=num_needles, num_questions=num_questions,
    )  # fmt: skip
    assert document.tokens.shape == (length,)
    assert len(document.questions) == num_questions
    assert np.count_nonzero(document.body == words.set) == num_needles
    for question in document.questions:
        start = question.answer_start
        assert (document.tokens[start - 3 : start] == question.prompt).all()
        assert (document.tokens[start : start + 2] == question.answer).all()
        needle = document.body[question.needle_start : question.needle_start + 5]
        assert needle[0] == words.set
        assert (needle[1:3] == question.prompt[1:]).all()
        assert (needle[3:] == question.answer).all()


def test_evaluation_asks_for_held_out_keys_and_values_only(words: Vocabulary, text: Ints) -> None:
    for seed in range(20):
        document = retrieval_document(300, haystack="text", seed=seed, vocabulary=words, text=text, num_needles=8)
        found = items(document.tokens, words, words.set)
        assert len({key for _, key, _ in found}) == 8
        assert all(is_held_out(words, "key", key) for _, key, _ in found)
        assert all(is_held_out(words, "value", value) for _, _, value in found)


def test_needles_lie_in_every_part_of_a_document(words: Vocabulary) -> None:
    document = retrieval_document(4096, haystack="noise", seed=3, vocabulary=words, num_needles=8)
    starts = sorted(question.needle_start for question in document.questions)
    # in tokens of the haystack, 4,015 of them: the needles before a needle are not counted
    depths = [start - 1 - 5 * i for i, start in enumerate(starts)]
    assert [depth * 8 // 4016 for depth in depths] == list(range(8))


def test_a_document_is_a_function_of_its_seed(words: Vocabulary, text: Ints) -> None:
    def document(seed: int) -> bytes:
        return retrieval_document(256, haystack="text", seed=seed, vocabulary=words, text=text).tokens.tobytes()

    assert document(1) == document(1)
    assert document(1) != document(2)


def test_a_short_text_is_read_in_a_circle() -> None:
    sliced = text_slice(np.random.default_rng(0), np.arange(5), 12)
    assert ((sliced[1:] - sliced[:-1]) % 5 == 1).all()


def test_documents_that_cannot_be_are_refused(words: Vocabulary) -> None:
    with pytest.raises(InputError, match="do not fit into 40 tokens; they need 41"):
        retrieval_document(40, haystack="noise", seed=0, vocabulary=words)
    with pytest.raises(InputError, match="ask between 1 and 4"):
        retrieval_document(400, haystack="noise", seed=0, vocabulary=words, num_questions=5)
    with pytest.raises(InputError, match="needs `text`"):
        retrieval_document(400, haystack="text", seed=0, vocabulary=words)
