"""One needle in a real document."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sala.data import Vocabulary
from sala.errors import InputError
from sala.eval import find_needle, needle_document


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
    scripted: Any, words: Vocabulary, text: np.ndarray, depth: float
) -> None:
    _, question = needle_document(words, text, length=300, depth=depth)
    answer = [*question.prompt.tolist(), *question.answer.tolist()]

    def continue_answer(tokens_BT: Tensor) -> Tensor:
        following = {answer[-3]: answer[-2], answer[-2]: answer[-1]}
        return torch.tensor([[following.get(int(token), 0) for token in tokens_BT[0]]])

    progress: list[int] = []
    result = find_needle(
        scripted(continue_answer),
        words,
        text,
        length=300,
        depth=depth,
        chunk_size=128,
        on_chunk=lambda done, total: progress.append(done),
    )
    assert result.correct
    assert result.answer == result.wanted
    assert progress == [128, 256, 300]


def test_a_wrong_answer_is_not_found(scripted: Any, words: Vocabulary, text: np.ndarray) -> None:
    result = find_needle(scripted(torch.zeros_like), words, text, length=300, depth=0.5)
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
