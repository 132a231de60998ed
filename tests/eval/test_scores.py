"""Scores for choosing layers, and the short abilities."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from sala.data import Document, Vocabulary, encode_documents, retrieval_document
from sala.errors import InputError
from sala.eval import copy_accuracy, layer_scorers, text_loss
from sala.eval.scores import SEED

DOCUMENTS = [Document("one.py", "x = 1\ny = 2\nprint(x, y)\n" * 40)]


def ignorant(tokens_BT: Tensor) -> Tensor:
    return torch.zeros_like(tokens_BT)


def test_copying_counts_only_what_can_be_known(scripted: Any, words: Vocabulary) -> None:
    def repeat(tokens_BT: Tensor) -> Tensor:
        rows = []
        for row in tokens_BT.tolist():
            # the longest segment is half a window: look for the shortest period that explains all so far
            period = next(p for p in range(1, len(row)) if row[2 + p :] == row[2:-p])
            rows.append([*row[3 : period + 2], *row[2:]][: len(row)] if period > 1 else row)
            rows[-1] = [row[max(2, index + 1 - period)] for index in range(len(row))]
        return torch.tensor(rows)

    assert copy_accuracy(scripted(repeat), words, length=64, windows=4) == 1.0
    assert copy_accuracy(scripted(ignorant), words, length=64, windows=4) == 0.0


def test_text_is_scored_by_hits_and_nats(scripted: Any, text: np.ndarray) -> None:
    score = text_loss(scripted(ignorant), np.zeros(500, np.int64), None, length=64, windows=3)
    assert score.tokens == 3 * 63
    assert score.accuracy == 1.0
    # the scripted logits are one-hot: 1 for the guess, 0 for the rest of the vocabulary
    vocab_size = scripted(ignorant).vocab_size
    assert score.loss == pytest.approx(np.log(np.e + vocab_size - 1) - 1, rel=1e-4)


def test_scores_of_the_embedded_tokenizer_ask_for_needles(scripted: Any, tokenizer: Any) -> None:
    scorers = layer_scorers(tokenizer, length=256, questions=32, windows=2, documents=DOCUMENTS)
    assert scorers.recall(scripted(ignorant)) == (0.0,) * 32
    language = scorers.language(scripted(ignorant))
    assert len(language) == 2 and all(0.0 <= share <= 1.0 for share in language)


def test_each_item_is_what_the_whole_evaluation_counts(tiny_hybrid: Any, tokenizer: Any, words: Vocabulary) -> None:
    """The scores are those of `retrieval` and `text_loss`, item by item."""
    scorers = layer_scorers(tokenizer, length=200, questions=64, windows=3, documents=DOCUMENTS)
    text = encode_documents(tokenizer, DOCUMENTS)
    whole = text_loss(tiny_hybrid, text, tokenizer.bos_token_id, length=200, windows=3)
    language = scorers.language(tiny_hybrid)
    assert sum(language) / len(language) == pytest.approx(whole.accuracy, rel=1e-12)
    # a model that knows the second half of what it is asked
    documents = [
        retrieval_document(200, haystack=hay, seed=SEED + i, vocabulary=words, text=text, num_needles=16)
        for hay in ("text", "noise")
        for i in range(2)
    ]
    known = {document.tokens.tobytes(): document for document in documents[1:]}
    wrong = documents[2].questions[5]

    class Reader(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: Tensor) -> Any:
            document = known.get(input_ids[0].numpy().tobytes())
            next_T = input_ids[0].roll(-1) if document is not None else torch.zeros_like(input_ids[0])
            if document is documents[2]:
                next_T[wrong.answer_start] += 1
            logits = nn.functional.one_hot(next_T[logits_to_keep], len(tokenizer)).float()
            return SimpleNamespace(logits=logits[None])

    right = [False] * 16 + [True] * 48
    right[32 + 5] = False
    assert scorers.recall(Reader()) == tuple(map(float, right))


def test_items_are_read_on_the_models_device(tokenizer: Any) -> None:
    devices = set()

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: Tensor | None = None) -> Any:
            devices.add(input_ids.device.type)
            if logits_to_keep is not None:
                devices.add(logits_to_keep.device.type)
            size = input_ids.shape[1] if logits_to_keep is None else len(logits_to_keep)
            return SimpleNamespace(logits=torch.zeros(1, size, len(tokenizer)))

    scorers = layer_scorers(tokenizer, length=200, questions=32, windows=2, documents=DOCUMENTS)
    assert len(scorers.recall(Elsewhere())) == 32
    assert len(scorers.language(Elsewhere())) == 2
    assert devices == {"meta"}


def test_another_tokenizer_is_asked_in_sentences(scripted: Any) -> None:
    letters = {letter: index for index, letter in enumerate(map(chr, range(128)))}
    plain = Tokenizer(models.WordLevel(letters, unk_token="\x00"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, clean_up_tokenization_spaces=False)
    scorers = layer_scorers(tokenizer, length=200, questions=8, windows=2, documents=DOCUMENTS)

    def look_up(tokens_BT: Tensor) -> Tensor:
        [row] = tokens_BT.tolist()
        predicted = []
        for index in range(len(row)):
            tail = row[max(0, index - 11) : index + 1]
            found = next((at for at in range(index) if row[max(0, at - 11) : at + 1] == tail), None)
            predicted.append(0 if found is None else row[found + 1])
        return torch.tensor([predicted])

    assert scorers.recall(scripted(look_up)) == (1.0,) * 8
    assert scorers.recall(scripted(ignorant)) == (0.0,) * 8

    calls: list[int] = []

    def count(tokens_BT: Tensor) -> Tensor:
        calls.append(tokens_BT.shape[1])
        return look_up(tokens_BT)

    together = layer_scorers(tokenizer, length=400, questions=7, needles=3, windows=2, documents=DOCUMENTS)
    assert together.recall(scripted(count)) == (1.0,) * 7
    assert len(calls) == 3 and max(calls) <= 400
    with pytest.raises(InputError, match="9 needles in a document of text; expected at most 8"):
        layer_scorers(tokenizer, needles=9, documents=DOCUMENTS)
