"""Needles in a real document of any length: read it in chunks, ask at the end, generate the answers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sala.data import Question, Vocabulary, retrieval_document
from sala.data import vocabulary as task_words
from sala.data.tasks import NEEDLE_SIZE
from sala.engine import DEFAULT_CHUNK, Sampling, generate, logits_at
from sala.errors import InputError
from sala.model import new_cache

SEED = 93_000


@dataclass(frozen=True, slots=True)
class NeedleResult:
    """What happened to one needle.

    read_s: wall time of reading the document and the question, up to the first token of the answer; read_tokens_per_s
        follows from it. decode_s: wall time of every later token. cache_bytes: of the cache at the end.
    """

    length: int
    depth: float
    answer: tuple[int, ...]
    wanted: tuple[int, ...]
    correct: bool
    read_s: float
    read_tokens_per_s: float
    decode_s: float
    cache_bytes: int


def needle_document(
    vocabulary: Vocabulary, text: NDArray[np.int64], *, length: int, depth: float, seed: int = SEED
) -> tuple[NDArray[np.int64], Question]:
    """Return `length` tokens, the text from its start with one held-out needle at `depth`, ending with the question.

    Args:
        text: (tokens,) the document; at least `length` tokens less the needle and the question.
        depth: 0 is the start of the document, 1 its end.

    Raises:
        InputError: the text is too short, or `depth` is not in [0, 1].
    """
    # the needle and question of the generated documents, in other surroundings
    hidden = retrieval_document(4 * NEEDLE_SIZE, haystack="noise", seed=seed, vocabulary=vocabulary, num_needles=1)
    [question] = hidden.questions
    needle = hidden.tokens[question.needle_start : question.needle_start + NEEDLE_SIZE]
    room = length - 1 - NEEDLE_SIZE - len(question.prompt)
    if not 0 <= room <= len(text):
        raise InputError(
            f"a document of {length} tokens with a needle and a question needs {room} tokens of text; there are "
            f"{len(text)}"
        )
    if not 0 <= depth <= 1:
        raise InputError(f"depth {depth} is not between 0, the start of the document, and 1, its end")
    cut = round(depth * room)
    tokens = np.concatenate([[vocabulary.begin], text[:cut], needle, text[cut:room], question.prompt])
    return tokens, replace(question, answer_start=length, needle_start=1 + cut)


def find_needle(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: NDArray[np.int64],
    *,
    length: int,
    depth: float,
    seed: int = SEED,
    chunk_size: int = DEFAULT_CHUNK,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> NeedleResult:
    """Read a document of `length` tokens with one needle and generate the answer greedily, a token at a time.

    Raises:
        InputError: see `needle_document`.
    """
    document, question = needle_document(task_words(tokenizer), text, length=length, depth=depth, seed=seed)
    answer = generate(
        model, tokenizer, document.tolist(), _greedy(question), chunk=chunk_size, warn=False, on_prefill=on_tokens
    )
    cost, wanted = answer.statistics, tuple(question.answer.tolist())
    return NeedleResult(
        length=length,
        depth=depth,
        answer=answer.tokens,
        wanted=wanted,
        correct=answer.tokens == wanted,
        read_s=cost.first_token_s,
        read_tokens_per_s=length / cost.first_token_s,
        decode_s=cost.decode_s,
        cache_bytes=cost.cache_bytes,
    )


def _greedy(question: Question) -> Sampling:
    return Sampling(max_new_tokens=len(question.answer))


@dataclass(frozen=True, slots=True)
class Answer:
    """What one of several needles came to; depth: 0 is the start of the document, 1 its end."""

    depth: float
    answer: tuple[int, ...]
    wanted: tuple[int, ...]

    @property
    def correct(self) -> bool:
        return self.answer == self.wanted


@dataclass(frozen=True, slots=True)
class NeedlesResult:
    """What happened to the needles of one document, ordered by depth.

    read_s: wall time of reading the document. answer_s: of asking for all of them. cache_bytes: after reading.
    """

    length: int
    answers: tuple[Answer, ...]
    read_s: float
    read_tokens_per_s: float
    answer_s: float
    cache_bytes: int

    @property
    def found(self) -> int:
        return sum(answer.correct for answer in self.answers)


@torch.inference_mode()
def find_needles(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: NDArray[np.int64],
    *,
    length: int,
    num_needles: int,
    seed: int = SEED,
    chunk_size: int = DEFAULT_CHUNK,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> NeedlesResult:
    """Read a document with `num_needles` held-out needles once, and ask for each from the moment the reading ended.

    Needle i lies at a random place of the i-th of equal parts. `length` counts the document with one question and its
    answer. No question sees another: the cache is taken back to the mark at the end of the document each time.

    Args:
        text: (tokens,) the document; it is read in a circle when it is shorter than `length`.
        on_tokens: called after every chunk with its number of tokens.

    Raises:
        InputError: the needles do not fit.
    """
    questions_size = NEEDLE_SIZE * num_needles
    document = retrieval_document(
        length - NEEDLE_SIZE + questions_size,
        haystack="text",
        seed=seed,
        vocabulary=task_words(tokenizer),
        text=text,
        num_needles=num_needles,
    )
    body_T = torch.from_numpy(document.body)
    cache = new_cache(model.config, reserve=length)
    started = perf_counter()
    # the last logits too: reading ends with them
    logits_at(model, body_T, torch.tensor([len(body_T) - 1]), chunk=chunk_size, cache=cache, on_tokens=on_tokens)
    read_s, cache_bytes = perf_counter() - started, cache.size_bytes
    end = cache.mark()
    answers = []
    for question in sorted(document.questions, key=lambda question: question.needle_start):
        cache.rewind(end)
        prompt = [*document.body.tolist(), *question.prompt.tolist()]
        said = generate(model, tokenizer, prompt, _greedy(question), cache=cache, warn=False)
        answers.append(Answer(question.needle_start / len(body_T), said.tokens, tuple(question.answer.tolist())))
    return NeedlesResult(
        length=length,
        answers=tuple(answers),
        read_s=read_s,
        read_tokens_per_s=len(body_T) / read_s,
        answer_s=perf_counter() - started - read_s,
        cache_bytes=cache_bytes,
    )
