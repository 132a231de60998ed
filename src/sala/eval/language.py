"""Short abilities that a conversion must not cost: predicting text, copying; and prediction by position in a long text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sala.data import Document, Mix, Vocabulary, encode_stream, library_documents
from sala.errors import InputError
from sala.eval.reader import LocalReader
from sala.eval.retrieval import task_ground
from sala.eval.task import Predictions, Setting, Style, Task, Window

SEED = 91_000
COPY_GROUP, TEXT_GROUP = "copy", "perplexity"
# the first end of the ranges of positions that a loss is told for; each is twice as long as the one before
FIRST_RANGE = 64


@dataclass(frozen=True, slots=True)
class TextScore:
    """loss: nats a token; accuracy: share of tokens whose most likely prediction was right."""

    tokens: int
    loss: float
    accuracy: float


def text_loss(
    model: Any, text: NDArray[np.int64], begin: int | None, *, length: int = 512, windows: int = 16
) -> TextScore:
    """Score `model` on `windows` windows of `length` tokens, evenly spread over `text` (tokens,), `begin` before each."""
    pieces = text_windows(text, begin, length=length, windows=windows)
    predicted = _predicted(model, [_all_asked(tokens_T.numpy()) for tokens_T in pieces])
    log_probs = np.concatenate([row.log_probs for row in predicted])
    right = np.concatenate([row.right for row in predicted])
    return TextScore(len(right), float(-log_probs.mean()), float(right.mean()))


def text_windows(text: NDArray[np.int64], begin: int | None, *, length: int, windows: int) -> list[Tensor]:
    """Cut `windows` pieces of `length` tokens, evenly spread over `text` (tokens,), `begin` counted and before each."""
    prefix = [] if begin is None else [begin]
    size = min(length - len(prefix), len(text))
    starts = np.linspace(0, len(text) - size, windows).astype(int)
    return [torch.from_numpy(np.concatenate([prefix, text[start : start + size]]).astype(np.int64)) for start in starts]


def copy_accuracy(model: Any, vocabulary: Vocabulary, *, length: int = 512, windows: int = 16) -> float:
    """Return the share of repeated symbols that `model` predicts, once a repetition can be told from what came before."""
    predicted = _predicted(model, copy_windows(vocabulary, length, windows))
    return float(np.concatenate([row.right for row in predicted]).mean())


def copy_windows(vocabulary: Vocabulary, length: int, windows: int, step: int = 0) -> list[Window]:
    batch = Mix({"copy": 1.0}, length, windows, SEED, vocabulary, np.zeros(1, np.int64)).batch(step)
    return [
        Window(tokens, np.flatnonzero(weights[1:] >= 1) + 1)
        for tokens, weights in zip(batch.input_ids, batch.loss_weights, strict=True)
    ]


def _predicted(model: Any, windows: Sequence[Window]) -> list[Predictions]:
    found = dict(LocalReader(model, batch=len(windows)).predict(enumerate(windows)))
    return [row for i in range(len(windows)) if isinstance(row := found[i], Predictions)]


def _all_asked(tokens: NDArray[np.int64]) -> Window:
    return Window(tokens, np.arange(1, len(tokens)))


def make_text(setting: Setting, length: int, index: int) -> Window:
    """Return a window of the user's text, or of the test split's source code, from a start of the index's own."""
    text = setting.keep("text", lambda: _stream(setting))
    begin = setting.tokenizer.bos_token_id
    prefix = [] if begin is None else [begin]
    size = length - len(prefix)
    if not 1 < size <= len(text):
        raise InputError(f"a window of {length:,} tokens; expected 3 to {len(text):,}, what the text has")
    start = setting.rng("text", length, index).randint(0, len(text) - size)
    return _all_asked(np.concatenate([prefix, text[start : start + size]]).astype(np.int64))


def _stream(setting: Setting) -> NDArray[np.int64]:
    given = "prose" in setting.files
    documents = [Document("prose", setting.read("prose"))] if given else library_documents("test")
    return encode_stream(setting.tokenizer, documents, [])


def make_copy(setting: Setting, length: int, index: int) -> Window:
    words, _ = task_ground(setting)
    [window] = copy_windows(words, length, 1, index)
    return window


def mean_loss(window: Window, predictions: Predictions, style: Style) -> float:
    return float(-predictions.log_probs.mean())


def share_right(window: Window, predictions: Predictions, style: Style) -> float:
    return float(predictions.right.mean())


def by_position(window: Window, predictions: Predictions) -> Mapping[str, Any]:
    """Return the loss of ranges of positions: [end, nats a token], each range from the end of the one before it."""
    ranges, start, end = [], 0, FIRST_RANGE
    while start < len(window.tokens):
        inside = (window.asked >= start) & (window.asked < end)
        if inside.any():
            ranges.append([min(end, len(window.tokens)), round(float(-predictions.log_probs[inside].mean()), 6)])
        start, end = end, 2 * end
    return {"by_position": ranges}


TASKS = (
    Task("copy", make_copy, share_right, COPY_GROUP, predicts=True),
    Task(
        "ppl",
        make_text,
        mean_loss,
        TEXT_GROUP,
        measure="nats a token",
        higher_is_better=False,
        predicts=True,
        note=by_position,
    ),
)
