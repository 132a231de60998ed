"""What the demo and the trials measure on a teacher and its hybrid."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sala.data import Vocabulary, encode_documents, library_documents, vocabulary
from sala.demo.plan import Plan, work
from sala.demo.progress import Meter, Observer
from sala.eval import copy_accuracy, retrieval, text_loss
from sala.model import new_cache, with_mixers
from sala.model.kinds import LIGHTNING
from sala.model.mixers import sparse_mixers

TEACHER, HYBRID_FULL, HYBRID_SPARSE = "teacher", "hybrid, full attention", "hybrid, sparse attention"


@dataclass(frozen=True)
class Ground:
    """The text that evaluation stands on: documents of the test split, one stream of tokens, and the task words."""

    text: NDArray[np.int64]
    words: Vocabulary


def read_ground(tokenizer: PreTrainedTokenizerBase) -> Ground:
    return Ground(encode_documents(tokenizer, library_documents("test")), vocabulary(tokenizer))


def variants(hybrid: Any) -> dict[str, Any]:
    """Return the hybrid with full and with block-sparse attention in its kept layers, on the same parameters.

    A hybrid without kept layers is one model, whatever it is called.
    """
    kinds = hybrid.config.mixer_types
    if all(kind == LIGHTNING for kind in kinds):
        return {HYBRID_FULL: hybrid}
    return {
        HYBRID_FULL: with_mixers(hybrid, sparse_mixers(kinds, sparse=False)),
        HYBRID_SPARSE: with_mixers(hybrid, sparse_mixers(kinds, sparse=True)),
    }


def measure_retrieval(
    models: Mapping[str, Any], ground: Ground, plan: Plan, observer: Observer
) -> list[dict[str, Any]]:
    """Return one row a model, haystack and length: the model's name and every field of a `RetrievalPoint`."""
    asked = [
        (length, haystack, name, plan.questions[length].teacher if name == TEACHER else plan.questions[length].hybrid)
        for length in plan.lengths
        for haystack in plan.haystacks
        for name in models
    ]
    weight = {name: layer_weight(model) for name, model in models.items()}
    documents = [-(-questions // plan.needles) for *_, questions in asked]
    costs = [work_of(length, weight[name]) for length, _, name, _ in asked]
    total = sum(count * cost for count, cost in zip(documents, costs, strict=True))
    meter = Meter(observer, "retrieval", sum(documents), total)
    rows = []
    for (length, haystack, name, questions), cost in zip(asked, costs, strict=True):
        detail = f"{name}, {length:,} tokens of {haystack}"

        def note(done: int, documents: int, detail: str = detail, cost: float = cost) -> None:
            meter.advance(detail, cost)

        point = retrieval(
            models[name],
            ground.words,
            haystack=cast(Literal["text", "noise"], haystack),
            length=length,
            text=ground.text,
            questions=questions,
            needles=plan.needles,
            on_document=note,
        )
        rows.append({"model": name} | asdict(point))
    return rows


def layer_weight(model: Any) -> float:
    """Return the share of layers whose cost grows with the square of the length."""
    kinds: Sequence[str] = model.config.mixer_types
    return sum(kind != LIGHTNING for kind in kinds) / len(kinds)


def work_of(length: int, weight: float) -> float:
    """Return a forecast of what reading `length` tokens costs a model with this share of softmax layers."""
    return length + weight * (work(length) - length)


def measure_language(models: Mapping[str, Any], ground: Ground, length: int) -> list[dict[str, Any]]:
    """Return one row a model: copying and prediction of unseen text at `length` tokens."""
    return [
        {
            "model": name,
            "length": length,
            "copy_accuracy": copy_accuracy(model, ground.words, length=length),
            "text": asdict(text_loss(model, ground.text, ground.words.begin, length=length)),
        }
        for name, model in models.items()
    ]


@torch.no_grad()
def measure_cache(models: Mapping[str, Any], ground: Ground, lengths: tuple[int, int]) -> list[dict[str, Any]]:
    """Return one row a model: bytes that its cache grows by with a token, and those that it has whatever the length.

    Both are those of caches that have read `lengths` tokens.
    """
    rows = []
    for name, model in models.items():
        sizes = []
        for length in lengths:
            cache = new_cache(model.config)
            model(torch.from_numpy(ground.text[:length])[None], cache=cache, use_cache=True, logits_to_keep=1)
            sizes.append(cache.size_bytes)
        a_token = (sizes[1] - sizes[0]) / (lengths[1] - lengths[0])
        rows.append({"model": name, "bytes_a_token": a_token, "bytes_at_any_length": sizes[0] - lengths[0] * a_token})
    return rows
