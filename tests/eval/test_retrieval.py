"""Retrieval: what counts as an answer, and that how a document is read does not matter."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sala.data import Vocabulary, retrieval_document
from sala.errors import InputError
from sala.eval import retrieval
from sala.eval.reader import LocalReader
from sala.eval.retrieval import retrieval_window


def look_up(tokens_BT: Tensor, wrong: Callable[[int, int], bool] = lambda which, token: False) -> Tensor:
    """Predict, after each token, what followed the same pair of tokens before; `wrong` spoils chosen predictions."""
    [row] = tokens_BT.tolist()
    followers: dict[tuple[int, int], int] = {}
    predicted = []
    for index, token in enumerate(row):
        pair = (row[index - 1], token) if index else (-1, token)
        guess = followers.get(pair, 0)
        predicted.append(0 if wrong(index, guess) else guess)
        if index + 1 < len(row):
            followers.setdefault(pair, row[index + 1])
    return torch.tensor([predicted])


# ids below the symbols: in this haystack a pair of symbols occurs in needles and questions only
TEXT = np.random.default_rng(0).integers(0, 256, 600)


def ask(model: Any, words: Vocabulary, **changes: Any) -> Any:
    settings: dict[str, Any] = {"haystack": "text", "text": TEXT, "length": 160, "questions": 12, "needles": 4}
    return retrieval(model, words, **(settings | changes))


def test_a_model_that_looks_up_scores_one(scripted: Any, words: Vocabulary) -> None:
    point = ask(scripted(look_up), words)
    assert (point.accuracy, point.correct, point.questions, point.documents) == (1.0, 12, 12, 3)
    assert point.low < 1.0 == point.high


def test_a_model_that_guesses_scores_nothing(scripted: Any, words: Vocabulary) -> None:
    def guess(tokens_BT: Tensor) -> Tensor:
        return torch.from_numpy(words.symbols[(tokens_BT.numpy() * 7) % len(words.symbols)])

    point = ask(scripted(guess), words)
    assert point.accuracy == 0.0 == point.low < point.high


@pytest.mark.parametrize("token", [0, 1])
def test_an_answer_counts_only_when_both_tokens_match(scripted: Any, words: Vocabulary, token: int) -> None:
    document = retrieval_document(160, haystack="text", text=TEXT, seed=0, vocabulary=words, num_needles=4)
    spoiled = {question.answer_start - 1 + token for question in document.questions[:3]}

    def answer(tokens_BT: Tensor) -> Tensor:
        return look_up(tokens_BT, wrong=lambda index, _: index in spoiled)

    point = ask(scripted(answer), words, seed=0, questions=4)
    assert point.correct == 1
    assert point.first_token_accuracy == (0.25 if token == 0 else 1.0)


def test_depths_hold_every_question_once(scripted: Any, words: Vocabulary) -> None:
    point = ask(scripted(look_up), words, length=400, questions=16)
    assert sum(part.questions for part in point.depths) == 16
    assert [part.questions for part in point.depths] == [4, 4, 4, 4]
    assert sum(part.correct for part in point.depths) == point.correct


def test_chunks_of_any_size_give_the_same_answers(tiny_hybrid: Any, words: Vocabulary) -> None:
    document = retrieval_document(130, haystack="noise", seed=3, vocabulary=words, num_needles=3)
    window = retrieval_window(document)

    def predicted(chunk: int) -> Any:
        [(_, predictions)] = LocalReader(tiny_hybrid, chunk=chunk).predict([(0, window)])
        return predictions

    whole = predicted(130)
    for chunk in (1, 63, 64):
        np.testing.assert_array_equal(whole.right, predicted(chunk).right)
        np.testing.assert_allclose(whole.log_probs, predicted(chunk).log_probs, atol=1e-4)


def test_a_document_is_read_in_chunks_and_asked_only_at_its_answers(scripted: Any, words: Vocabulary) -> None:
    model = scripted(look_up)
    ask(model, words, questions=4, chunk_size=64)
    assert model.calls == [64, 64, 32]


def test_every_model_gets_the_same_documents(scripted: Any, words: Vocabulary) -> None:
    first, second = scripted(look_up), scripted(look_up)
    for model in (first, second):
        ask(model, words, haystack="noise")
    torch.testing.assert_close(first.seen, second.seen)


def test_no_questions_are_refused(scripted: Any, words: Vocabulary) -> None:
    with pytest.raises(InputError, match="at least 1"):
        ask(scripted(look_up), words, questions=0)
