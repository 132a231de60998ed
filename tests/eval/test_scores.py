"""Scores for choosing layers, and the short abilities."""

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sala.data import Document, Vocabulary
from sala.eval import copy_accuracy, layer_scorers, text_loss

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
    assert scorers.recall(scripted(ignorant)) == 0.0
    assert 0.0 <= scorers.language(scripted(ignorant)) <= 1.0


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

    assert scorers.recall(scripted(look_up)) == 1.0
    assert scorers.recall(scripted(ignorant)) == 0.0
