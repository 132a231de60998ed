"""Needles in a real document."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sala.data import Vocabulary, retrieval_document
from sala.errors import InputError
from sala.eval import find_needle, find_needles, needle_document


def test_the_document_is_the_text_with_one_needle_at_its_depth(words: Vocabulary, text: np.ndarray) -> None:
    tokens, question = needle_document(words, text, length=400, depth=0.5)
    assert len(tokens) == 400
    needle = np.concatenate([[words.set], question.prompt[1:], question.answer])
    at = question.needle_start
    np.testing.assert_array_equal(tokens[at : at + len(needle)], needle)
    np.testing.assert_array_equal(tokens[-len(question.prompt) :], question.prompt)
    hay = np.concatenate([tokens[1:at], tokens[at + len(needle) : -len(question.prompt)]])
    np.testing.assert_array_equal(hay, text[: len(hay)])
    assert abs(at / 400 - 0.5) < 0.02


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_model_that_looks_up_finds_it_at_any_depth(
    scripted: Any, tokenizer: Any, words: Vocabulary, text: np.ndarray, depth: float
) -> None:
    _, question = needle_document(words, text, length=300, depth=depth)
    answer = [*question.prompt.tolist(), *question.answer.tolist()]

    def continue_answer(tokens_BT: Tensor) -> Tensor:
        following = {answer[-3]: answer[-2], answer[-2]: answer[-1]}
        return torch.tensor([[following.get(int(token), 0) for token in tokens_BT[0]]])

    progress: list[int] = []
    result = find_needle(
        scripted(continue_answer),
        tokenizer,
        text,
        length=300,
        depth=depth,
        chunk_size=128,
        on_tokens=progress.append,
    )
    assert result.correct
    assert result.answer == result.wanted
    assert progress == [128, 128, 44]


def test_a_wrong_answer_is_not_found(scripted: Any, tokenizer: Any, text: np.ndarray) -> None:
    result = find_needle(scripted(torch.zeros_like), tokenizer, text, length=300, depth=0.5)
    assert not result.correct
    assert result.answer == (0, 0)


@pytest.mark.parametrize(
    ("length", "depth", "message"), [(700, 0.5, "there are 600"), (5, 0.5, "needs"), (300, 1.5, "depth 1.5")]
)
def test_documents_that_cannot_be_are_refused(
    words: Vocabulary, text: np.ndarray, length: int, depth: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        needle_document(words, text, length=length, depth=depth)


def test_each_of_several_needles_is_asked_for_alone(
    scripted: Any, tokenizer: Any, words: Vocabulary, text: np.ndarray
) -> None:
    document = retrieval_document(400 - 5 + 5 * 3, haystack="text", seed=7, vocabulary=words, text=text, num_needles=3)
    # what the model knows: the answers of two needles, and nothing of the one in the middle
    middle = sorted(document.questions, key=lambda question: question.needle_start)[1]
    known = {}
    for question in document.questions:
        if question is not middle:
            first, second = question.answer.tolist()
            known |= {tuple(question.prompt.tolist()): first, (*question.prompt[1:].tolist(), first): second}

    def look_up(tokens_BT: Tensor) -> Tensor:
        following = torch.zeros_like(tokens_BT)
        # right before the answer stands one question, and before it the document alone
        if tokens_BT.shape[1] - len(document.body) in (3, 4):
            following[0, -1] = known.get(tuple(tokens_BT[0, -3:].tolist()), 0)
        return following

    result = find_needles(scripted(look_up), tokenizer, text, length=400, num_needles=3, seed=7, chunk_size=128)
    assert [answer.correct for answer in result.answers] == [True, False, True]
    assert result.found == 2
    depths = [answer.depth for answer in result.answers]
    assert all(i / 3 <= depth <= (i + 1) / 3 for i, depth in enumerate(depths))


def test_needles_that_do_not_fit_are_refused(scripted: Any, tokenizer: Any, text: np.ndarray) -> None:
    with pytest.raises(InputError, match="needles"):
        find_needles(scripted(torch.zeros_like), tokenizer, text, length=20, num_needles=8)
