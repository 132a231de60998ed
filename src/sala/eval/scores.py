"""The two scores that HALO chooses layers by, for any tokenizer: recall of a needle, and prediction of short text."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sala.data import Document, encode_documents, library_documents, vocabulary
from sala.errors import InputError
from sala.eval.language import text_loss
from sala.eval.retrieval import retrieval

SEED = 92_000
# words for needles of tokenizers that have no symbols of ours
NAMES = ("amber", "birch", "coral", "delta", "ember", "falcon", "granite", "harbor")


@dataclass(frozen=True, slots=True)
class LayerScorers:
    """model -> share of answers right, and model -> share of tokens predicted right; in both higher is better."""

    recall: Callable[[Any], float]
    language: Callable[[Any], float]


def layer_scorers(
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = 512,
    questions: int = 128,
    windows: int = 16,
    documents: list[Document] | None = None,
) -> LayerScorers:
    """Return the scores for models with this tokenizer, on documents of the validation split.

    With the embedded tokenizer recall is `retrieval` in text and in noise, half of the questions each. Another
    tokenizer gets sentences about numbers hidden in the same text, an answer being right when every digit's token is.
    """
    documents = library_documents("valid") if documents is None else documents
    text = _encode(tokenizer, documents)
    begin = tokenizer.bos_token_id

    def language(model: Any) -> float:
        return text_loss(model, text, begin, length=length, windows=windows).accuracy

    try:
        words = vocabulary(tokenizer)
    except InputError:
        return LayerScorers(_recall_of_sentences(tokenizer, text, length, questions), language)

    def recall(model: Any) -> float:
        points = [
            retrieval(
                model,
                words,
                haystack=haystack,
                length=length,
                text=text,
                questions=questions // 2,
                seed=SEED,
                chunk_size=None,
            )
            for haystack in ("text", "noise")
        ]
        return sum(point.correct for point in points) / sum(point.questions for point in points)

    return LayerScorers(recall, language)


def _encode(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> NDArray[np.int64]:
    try:
        vocabulary(tokenizer)
    except InputError:
        rows = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
        return np.concatenate([np.asarray(row, np.int64) for row in rows])
    return encode_documents(tokenizer, documents)


def _recall_of_sentences(
    tokenizer: PreTrainedTokenizerBase, text: NDArray[np.int64], length: int, questions: int
) -> Callable[[Any], float]:
    """Score by `The number of amber is 48213.` somewhere in the text and `The number of amber is` at its end."""
    rng = np.random.default_rng(SEED)
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(line: str) -> list[int]:
        return tokenizer(line, add_special_tokens=False)["input_ids"]

    rows: list[tuple[torch.Tensor, int]] = []
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
        rows.append((torch.tensor(tokens), len(answer)))

    @torch.no_grad()
    def recall(model: Any) -> float:
        hits = 0
        for tokens_T, size in rows:
            kept = torch.arange(len(tokens_T) - size - 1, len(tokens_T) - 1)
            logits = model(input_ids=tokens_T[None], use_cache=False, logits_to_keep=kept).logits[0]
            hits += bool((logits.argmax(-1) == tokens_T[-size:]).all())
        return hits / len(rows)

    return recall
