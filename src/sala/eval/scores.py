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
from sala.eval.reader import device_of
from sala.eval.retrieval import NEEDLES

SEED = 92_000
# words for needles of tokenizers that have no symbols of ours
NAMES = ("amber", "birch", "coral", "delta", "ember", "falcon", "granite", "harbor")

# behind an answer with fewer tokens than another one of its document
ANY = -1

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
    needles: int | None = None,
    windows: int = 16,
    documents: list[Document] | None = None,
) -> Scorers:
    """Return the scores for models with this tokenizer, on documents of the validation split and the model's device.

    Recall is 1 for every question that was answered right, else 0; language is, for every piece of text, the share of its
    tokens that were predicted right.

    With the embedded tokenizer recall is that of `retrieval`, in text and in noise, half of the questions each, at least
    and in whole documents of `needles` questions (16). Another tokenizer gets sentences about numbers hidden in the same
    text, `needles` of them in a document (1), an answer being right when every digit's token is. Language is the
    prediction of `windows` pieces of text of `length` tokens.

    Raises:
        InputError: more needles than a document of text has names for.
    """
    documents = library_documents("valid") if documents is None else documents
    try:
        words = vocabulary(tokenizer)
    except InputError:
        text = encode_stream(tokenizer, documents, [])
        readings = _sentences(tokenizer, text, length, questions, needles or 1)
    else:
        text = encode_documents(tokenizer, documents)
        readings = _documents(words, text, length, questions, needles or NEEDLES)
    pieces = text_windows(text, tokenizer.bos_token_id, length=length, windows=windows)

    def recall(model: Any) -> tuple[float, ...]:
        return tuple(float(right) for reading in readings for right in answered(model, reading))

    def language(model: Any) -> tuple[float, ...]:
        return tuple(predicted(model, tokens_T) for tokens_T in pieces)

    return Scorers(recall, language, sum(len(one.tokens_T) for one in readings) + sum(map(len, pieces)))


@torch.no_grad()
def answered(model: Any, reading: Reading) -> list[bool]:
    """Return for each question of a document, read in one call without a cache, whether all of its answer is right."""
    device = device_of(model)
    indices_N = reading.before_QA.flatten().to(device)
    logits_NX = model(input_ids=reading.tokens_T[None].to(device), use_cache=False, logits_to_keep=indices_N).logits[0]
    guesses_QA = logits_NX.argmax(dim=-1).cpu().view_as(reading.answers_QA)
    right_QA = (guesses_QA == reading.answers_QA) | (reading.answers_QA == ANY)
    return right_QA.all(dim=1).tolist()


@torch.no_grad()
def predicted(model: Any, tokens_T: Tensor) -> float:
    """Return the share of tokens that `model` predicts from those before them."""
    logits_TX = model(input_ids=tokens_T[None].to(device_of(model)), use_cache=False).logits[0, :-1]
    return (logits_TX.argmax(dim=-1).cpu() == tokens_T[1:]).double().mean().item()


def _documents(words: Vocabulary, text: Ints, length: int, questions: int, needles: int) -> list[Reading]:
    """Needles in text and in noise, all asked for at the end of their document."""
    readings = []
    for haystack in ("text", "noise"):
        for index in range(-(-(questions // 2) // needles)):
            document = retrieval_document(
                length, haystack=haystack, seed=SEED + index, vocabulary=words, text=text, num_needles=needles
            )
            answers_QA = np.stack([question.answer for question in document.questions])
            before_Q = np.array([question.answer_start - 1 for question in document.questions])
            readings.append(_reading(document.tokens, before_Q, answers_QA))
    return readings


def _sentences(
    tokenizer: PreTrainedTokenizerBase, text: Ints, length: int, questions: int, needles: int
) -> list[Reading]:
    """`The number of amber is 48213.` somewhere in the text and `The number of amber is` at its end, for each needle."""
    if needles > len(NAMES):
        raise InputError(f"{needles} needles in a document of text; expected at most {len(NAMES)}")
    rng = np.random.default_rng(SEED)
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(line: str) -> list[int]:
        return tokenizer(line, add_special_tokens=False)["input_ids"]

    readings = []
    for first in range(0, questions, needles):
        lines, asked, answers = [], [], []
        for index in range(first, min(first + needles, questions)):
            name, number = NAMES[index % len(NAMES)], int(rng.integers(10_000, 100_000))
            asked.append(encode(f"\nThe number of {name} is"))
            lines.append(encode(f"\nThe number of {name} is {number}.\n"))
            # the answer as it is tokenized inside its sentence
            answers.append(lines[-1][len(asked[-1]) :])
        room = max(0, length - len(prefix) - 2 * sum(map(len, lines)))
        start = int(rng.integers(0, max(1, len(text) - room)))
        cuts = sorted(int(rng.integers(0, room + 1)) for _ in lines)
        tokens = list(prefix)
        for line, after, before in zip(lines, cuts, [0, *cuts], strict=False):
            tokens += [*text[start + before : start + after], *line]
        tokens += text[start + cuts[-1] : start + room].tolist()
        before_Q = []
        for question, answer in zip(asked, answers, strict=True):
            tokens += question
            before_Q.append(len(tokens) - 1)
            tokens += answer
        widest = max(map(len, answers))
        readings.append(_reading(tokens, before_Q, [answer + [ANY] * (widest - len(answer)) for answer in answers]))
    return readings


def _reading(tokens: Sequence[int] | Ints, before_Q: Any, answers_QA: Any) -> Reading:
    """Each token of an answer is predicted after the right earlier ones: for an exact match, greedy decoding."""
    answers = np.asarray(answers_QA, np.int64)
    indices = np.minimum(np.asarray(before_Q, np.int64)[:, None] + np.arange(answers.shape[1]), len(tokens) - 1)
    return Reading(*(torch.from_numpy(array) for array in (np.asarray(tokens, np.int64), indices, answers)))
