"""Retrieval accuracy against length: how many values a model finds again, exactly, in text and in noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sala.data import (
    RetrievalDocument,
    Vocabulary,
    encode_documents,
    library_documents,
    retrieval_document,
)
from sala.data import vocabulary as task_words
from sala.data.tasks import Haystack
from sala.engine import DEFAULT_CHUNK
from sala.errors import InputError
from sala.eval.blocks import count_blocks
from sala.eval.interval import wilson_interval
from sala.eval.reader import LocalReader
from sala.eval.task import Predictions, Setting, Style, Task, Window

QUESTIONS = 256
NEEDLES = 16
DEPTH_BINS = 4
# far from the seeds of the documents that layers are chosen by
EVALUATION_SEED = 90_000


@dataclass(frozen=True, slots=True)
class DepthBin:
    """Questions whose needle began in this part of the document, 0 its start and 1 its end."""

    from_depth: float
    to_depth: float
    questions: int
    correct: int


@dataclass(frozen=True, slots=True)
class RetrievalPoint:
    """One point of a curve.

    accuracy: share of questions whose whole value, both tokens, was the model's greedy answer; low, high: its 95 %
        Wilson interval, which takes questions as independent.
    first_token_accuracy: share with the first token right.
    unread_share: of the blocks at and before each token of the questions, the share that block-sparse layers did not read; None for
        a model without such layers.
    median_read_s: median wall time of reading one document with its questions, the count of blocks included.
    """

    haystack: str
    length: int
    documents: int
    needles: int
    questions: int
    correct: int
    accuracy: float
    low: float
    high: float
    first_token_accuracy: float
    depths: tuple[DepthBin, ...]
    unread_share: float | None
    median_read_s: float


def retrieval(
    model: Any,
    vocabulary: Vocabulary,
    *,
    haystack: Haystack,
    length: int,
    text: NDArray[np.int64] | None = None,
    questions: int = QUESTIONS,
    needles: int = NEEDLES,
    seed: int = EVALUATION_SEED,
    chunk_size: int = DEFAULT_CHUNK,
    on_document: Callable[[int, int], None] = lambda done, total: None,
) -> RetrievalPoint:
    """Ask `model` at least `questions` questions, `needles` a document, in documents of exactly `length` tokens.

    Keys and values are those held out from training. Documents are the same for every model: a pure function of seed,
    haystack, length and needles. Each is read once, alone, in chunks (see `engine.read`).

    Args:
        model: anything `engine.read` reads with.
        text: (tokens,) a stream that was not trained on, to cut text haystacks from.
        on_document: called with (documents done, documents) after each.

    Raises:
        InputError: `questions` below 1, or a document that cannot be made.
    """
    if questions < 1:
        raise InputError(f"{questions} questions; at least 1")
    documents = -(-questions // needles)
    right: list[bool] = []
    first: list[bool] = []
    depths: list[float] = []
    seconds: list[float] = []
    unread: list[float] = []
    reader = LocalReader(model, chunk=chunk_size)
    for index in range(documents):
        document = retrieval_document(
            length, haystack=haystack, seed=seed + index, vocabulary=vocabulary, text=text, num_needles=needles
        )
        window = retrieval_window(document)
        started = perf_counter()
        with count_blocks(model, since=document.questions_start) as count:
            [(_, predictions)] = reader.predict([(index, window)])
        seconds.append(perf_counter() - started)
        assert isinstance(predictions, Predictions)
        answers = answered(window, predictions)
        right += [bool(row.all()) for row in answers]
        first += answers[:, 0].tolist()
        depths += [question.needle_start / document.questions_start for question in document.questions]
        if count.unread is not None:
            unread.append(count.unread)
        on_document(index + 1, documents)
    low, high = wilson_interval(sum(right), len(right))
    return RetrievalPoint(
        haystack=haystack,
        length=length,
        documents=documents,
        needles=needles,
        questions=len(right),
        correct=sum(right),
        accuracy=sum(right) / len(right),
        low=low,
        high=high,
        first_token_accuracy=sum(first) / len(first),
        depths=_by_depth(depths, right),
        unread_share=float(np.mean(unread)) if unread else None,
        median_read_s=float(np.median(seconds)),
    )


def retrieval_window(document: RetrievalDocument) -> Window:
    """Return a document whose answers are asked for, all from one reading.

    A later token of an answer is predicted after the right earlier ones, which for an exact match is what greedy
    decoding would do.
    """
    starts_Q = np.array([question.answer_start for question in document.questions])
    size = len(document.questions[0].answer)
    places = tuple(question.needle_start for question in document.questions)
    depths = [round(place / document.questions_start, 4) for place in places]
    return Window(
        document.tokens, (starts_Q[:, None] + np.arange(size)).ravel(), len(starts_Q), places, {"depths": depths}
    )


def answered(window: Window, predictions: Predictions) -> NDArray[Any]:
    """Return (answers, tokens of an answer): which tokens were right."""
    return predictions.right.reshape(window.groups, -1)


def share_answered(window: Window, predictions: Predictions, style: Style) -> float:
    return float(answered(window, predictions).all(axis=1).mean())


def _note(window: Window, predictions: Predictions) -> dict[str, Any]:
    return {"right": answered(window, predictions).all(axis=1).tolist()}


def make_retrieval(haystack: Haystack, needles: int, setting: Setting, length: int, index: int) -> Window:
    """Return the document of an index for a tokenizer that has the task words.

    Raises:
        InputError: it has not, or the needles do not fit.
    """
    words, text = task_ground(setting)
    return retrieval_window(
        retrieval_document(
            length,
            haystack=haystack,
            seed=EVALUATION_SEED + index,
            vocabulary=words,
            text=text,
            num_needles=needles,
        )
    )


def task_ground(setting: Setting) -> tuple[Vocabulary, NDArray[np.int64]]:
    """Return the task words of a setting's tokenizer and the test split's stream of tokens."""

    def read() -> tuple[Vocabulary, NDArray[np.int64]]:
        words = task_words(setting.tokenizer)
        return words, encode_documents(setting.tokenizer, library_documents("test"))

    return setting.keep("words", read)


GROUP = "retrieval"
ROWS: dict[str, tuple[Haystack, int]] = {
    "retrieval_text": ("text", NEEDLES),
    "retrieval_noise": ("noise", NEEDLES),
    "needle_text": ("text", 1),
}
TASKS = tuple(
    Task(name, partial(make_retrieval, *row), share_answered, GROUP, predicts=True, note=_note)
    for name, row in ROWS.items()
)


def _by_depth(depths: Sequence[float], right: Sequence[bool]) -> tuple[DepthBin, ...]:
    bins = np.minimum((np.asarray(depths) * DEPTH_BINS).astype(int), DEPTH_BINS - 1)
    hits = np.asarray(right)
    return tuple(
        DepthBin(
            index / DEPTH_BINS, (index + 1) / DEPTH_BINS, int((bins == index).sum()), int(hits[bins == index].sum())
        )
        for index in range(DEPTH_BINS)
    )
