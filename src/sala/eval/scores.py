"""The two scores that HALO chooses layers by, for any tokenizer: recall of a needle, and prediction of short text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sala.convert import Scorers
from sala.data import (
    Document,
    Vocabulary,
    encode_documents,
    encode_stream,
    library_documents,
    retrieval_document,
    vocabulary,
)
from sala.errors import InputError
from sala.eval.language import text_windows
from sala.eval.retrieval import NEEDLES

SEED = 92_000
# words for needles of tokenizers that have no symbols of ours
NAMES = ("amber", "birch", "coral", "delta", "ember", "falcon", "granite", "harbor")

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Reading:
    """One document (T,), and the tokens (Q, A) that are right after its indices (Q, A)."""

    tokens_T: Tensor
    before_QA: Tensor
    answers_QA: Tensor


def layer_scorers(
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = 512,
    questions: int = 128,
    windows: int = 16,
    documents: list[Document] | None = None,
) -> Scorers:
    """Return the scores for models with this tokenizer, on documents of the validation split and the model's device.

    Recall is 1 for every question that was answered right, else 0; language is, for every piece of text, the share of its
    tokens that were predicted right.

    With the embedded tokenizer recall is that of `retrieval`, in text and in noise, half of the questions each, at least
    and in whole documents. Another tokenizer gets sentences about numbers hidden in the same text, an answer being right
    when every digit's token is. Language is the prediction of `windows` pieces of text of `length` tokens.
    """
    documents = library_documents("valid") if documents is None else documents
    try:
        words = vocabulary(tokenizer)
    except InputError:
        text = encode_stream(tokenizer, documents, [])
        readings = _sentences(tokenizer, text, length, questions)
    else:
        text = encode_documents(tokenizer, documents)
        readings = _documents(words, text, length, questions)
    pieces = text_windows(text, tokenizer.bos_token_id, length=length, windows=windows)

    def recall(model: Any) -> tuple[float, ...]:
        return tuple(float(right) for reading in readings for right in answered(model, reading))

    def language(model: Any) -> tuple[float, ...]:
        return tuple(predicted(model, tokens_T) for tokens_T in pieces)

    return Scorers(recall, language)


@torch.no_grad()
def answered(model: Any, reading: Reading) -> list[bool]:
    """Return for each question of a document, read in one call without a cache, whether all of its answer is right."""
    device = device_of(model)
    indices_N = reading.before_QA.flatten().to(device)
    logits_NX = model(input_ids=reading.tokens_T[None].to(device), use_cache=False, logits_to_keep=indices_N).logits[0]
    right_QA = logits_NX.argmax(dim=-1).cpu().view_as(reading.answers_QA) == reading.answers_QA
    return right_QA.all(dim=1).tolist()


@torch.no_grad()
def predicted(model: Any, tokens_T: Tensor) -> float:
    """Return the share of tokens that `model` predicts from those before them."""
    logits_TX = model(input_ids=tokens_T[None].to(device_of(model)), use_cache=False).logits[0, :-1]
    return (logits_TX.argmax(dim=-1).cpu() == tokens_T[1:]).double().mean().item()


def device_of(model: Any) -> torch.device:
    """Return the device of the model's parameters; the CPU for one without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _documents(words: Vocabulary, text: Ints, length: int, questions: int) -> list[Reading]:
    """Needles in text and in noise, all asked for at the end of their document."""
    readings = []
    for haystack in ("text", "noise"):
        for index in range(-(-(questions // 2) // NEEDLES)):
            document = retrieval_document(
                length, haystack=haystack, seed=SEED + index, vocabulary=words, text=text, num_needles=NEEDLES
            )
            answers_QA = np.stack([question.answer for question in document.questions])
            before_Q = np.array([question.answer_start - 1 for question in document.questions])
            readings.append(_reading(document.tokens, before_Q, answers_QA))
    return readings


def _sentences(tokenizer: PreTrainedTokenizerBase, text: Ints, length: int, questions: int) -> list[Reading]:
    """`The number of amber is 48213.` somewhere in the text and `The number of amber is` at its end."""
    rng = np.random.default_rng(SEED)
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(line: str) -> list[int]:
        return tokenizer(line, add_special_tokens=False)["input_ids"]

    readings = []
    for index in range(questions):
        name, number = NAMES[index % len(NAMES)], int(rng.integers(10_000, 100_000))
        question = encode(f"\nThe number of {name} is")
        whole = encode(f"\nThe number of {name} is {number}.\n")
        # the answer as it is tokenized inside its sentence
        answer = whole[len(question) :]
        room = max(0, length - len(prefix) - 2 * len(whole))
        start = int(rng.integers(0, max(1, len(text) - room)))
        hay, cut = text[start : start + room], int(rng.integers(0, room + 1))
        tokens = [*prefix, *hay[:cut], *whole, *hay[cut:], *question, *answer]
        readings.append(_reading(tokens, [len(tokens) - len(answer) - 1], [answer]))
    return readings


def _reading(tokens: Sequence[int] | Ints, before_Q: Any, answers_QA: Any) -> Reading:
    """Each token of an answer is predicted after the right earlier ones: for an exact match, greedy decoding."""
    answers = np.asarray(answers_QA, np.int64)
    indices = np.asarray(before_Q, np.int64)[:, None] + np.arange(answers.shape[1])
    return Reading(*(torch.from_numpy(array) for array in (np.asarray(tokens, np.int64), indices, answers)))
