"""Generated tasks: retrieval in text and in noise, copying, variable tracking; windows to train on, documents to ask.

A needle is `[set] k1 k2 v1 v2`, a question `[get] k1 k2`, its answer `v1 v2`. A fifth of all key pairs and of
all value pairs is never in a training window: evaluation asks for those only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sala.data.tokenizer import Vocabulary
from sala.errors import InputError

Ints = NDArray[np.int64]
Haystack = Literal["text", "noise"]

NUM_SYMBOLS = 128
NEEDLE_SIZE = 5
ANSWER_SIZE = 2
MOST_NEEDLES = 16  # in a training window
ANSWER_WEIGHT = 8.0  # of a target that only the task can predict, against 1 for a token of text
COPY_CONTEXT = 2  # repeated symbols that are seen before the next one is asked for


@dataclass(frozen=True, slots=True)
class Window:
    """A training window: tokens (T,) and the weight (T,) of each token as a target, zero where nothing predicts it."""

    tokens: Ints
    loss_weights: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Question:
    """One question of an evaluation document: tokens `prompt` end right before index `answer_start` of the document."""

    prompt: Ints  # (3,): [get] k1 k2
    answer: Ints  # (2,): v1 v2
    answer_start: int
    needle_start: int


@dataclass(frozen=True, slots=True)
class RetrievalDocument:
    """A document with needles and, from `questions_start` on, questions with their answers.

    The model answers question q exactly when the greedy token after index `q.answer_start - 1` is the first token of
    the answer and the one after `q.answer_start` is the second: both are read from one forward pass, and together they
    are what greedy decoding would produce, because the second is only asked for after the right first. To ask one
    question alone, prefill `body` once and continue with `q.prompt`.
    """

    tokens: Ints  # (T,)
    questions_start: int
    questions: tuple[Question, ...]

    @property
    def body(self) -> Ints:
        """The document before its first question."""
        return self.tokens[: self.questions_start]


@cache
def pairs(role: Literal["key", "value"], held_out: bool) -> Ints:
    """Return pairs of symbol indices (P, 2): those for training, or the fifth held out for evaluation."""
    codes = np.arange(NUM_SYMBOLS**2, dtype=np.uint64)
    with np.errstate(over="ignore"):  # splitmix64, whose products wrap: a fixed permutation-like hash of the pair
        mixed = codes + np.uint64(0x9E3779B97F4A7C15) * np.uint64({"key": 1, "value": 2}[role])
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    chosen = codes[(mixed % np.uint64(5) == 0) == held_out].astype(np.int64)
    return np.stack(np.divmod(chosen, NUM_SYMBOLS), axis=1)


def text_window(rng: np.random.Generator, length: int, vocabulary: Vocabulary, text: Ints) -> Window:
    """Plain text: a random slice of the stream."""
    tokens = _begin(vocabulary, length)
    tokens[1:] = text_slice(rng, text, length - 1)
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return Window(tokens, weights)


def retrieval_window(
    rng: np.random.Generator,
    length: int,
    vocabulary: Vocabulary,
    text: Ints,
    haystack: Haystack,
    similar_keys: bool = False,
) -> Window:
    """Up to 16 needles at random offsets; each asked once after it was set, at the end or anywhere later.

    Random offsets and single questions matter: on a grid, or with repeated keys, position and recency predict answers
    and no lookup is learnt. In a third of the windows keys share symbols, so that both symbols of a key count. Half of
    the keys also stand in a noise haystack with no needle around them, as they do by chance in a long one.

    similar_keys: all keys share one of few symbols on one side, as very many pairs of a long noise haystack do. Else one
    symbol of a key is nearly always enough, and only that one is looked at.
    """
    num_needles = int(rng.integers(1, min(MOST_NEEDLES, (length - 1) // (2 * NEEDLE_SIZE)) + 1))
    keys = _similar_keys(rng, num_needles) if similar_keys else _keys(rng, num_needles, rng.random() < 1 / 3)
    values = rng.choice(pairs("value", held_out=False), num_needles)
    room = length - 1 - 2 * NEEDLE_SIZE * num_needles
    if rng.random() < 0.5:
        # every item once in each half: needles in any order, then questions in any order
        order = np.concatenate([rng.permutation(num_needles), rng.permutation(num_needles)])
        cuts = np.concatenate([np.sort(rng.integers(0, room + 1, num_needles)), np.full(num_needles, room)])
    else:
        # an item's first occurrence sets it, its second asks
        order = rng.permutation(np.repeat(np.arange(num_needles), 2))
        cuts = np.sort(rng.integers(0, room + 1, 2 * num_needles))
    first = np.zeros(2 * num_needles, bool)
    first[np.unique(order, return_index=True)[1]] = True

    items = _needles(vocabulary, keys, values)[order]
    items[~first, 0] = vocabulary.get
    item_weights = np.zeros(items.shape, np.float32)
    item_weights[~first, -ANSWER_SIZE:] = ANSWER_WEIGHT
    hay, hay_weight = _haystack(rng, room, vocabulary, text, haystack)
    if haystack == "noise" and room >= 2:
        decoys = vocabulary.symbols[keys[rng.random(num_needles) < 0.5]]
        places = rng.integers(0, room - 1, len(decoys))
        hay[places], hay[places + 1] = decoys[:, 0], decoys[:, 1]

    tokens, weights = _begin(vocabulary, length), np.zeros(length, np.float32)
    at = _item_indices(cuts)
    is_hay = np.ones(length, bool)
    is_hay[0] = False
    is_hay[at] = False
    tokens[at], weights[at] = items, item_weights
    tokens[is_hay], weights[is_hay] = hay, hay_weight
    return Window(tokens, weights)


def copy_window(rng: np.random.Generator, length: int, vocabulary: Vocabulary) -> Window:
    """`[copy]` and a segment of random symbols over and over; every repetition weighs.

    Sizes are log-uniform: short segments teach to look back by a distance, long ones to look back by content. In half
    of the windows the alphabet is small, so that one symbol of context does not tell what follows.
    """
    size = int(np.exp(rng.uniform(np.log(2), np.log(length // 2))))
    alphabet_size = NUM_SYMBOLS if rng.random() < 0.5 else int(np.exp(rng.uniform(np.log(8), np.log(NUM_SYMBOLS))))
    segment = rng.choice(rng.permutation(vocabulary.symbols)[:alphabet_size], size)
    tokens, weights = _begin(vocabulary, length), np.zeros(length, np.float32)
    tokens[1] = vocabulary.copy
    tokens[2:] = np.resize(segment, length - 2)
    weights[2 + size + min(size, COPY_CONTEXT) :] = 1
    return Window(tokens, weights)


def variable_window(rng: np.random.Generator, length: int, vocabulary: Vocabulary) -> Window:
    """Chains `[let] x v`, `[let] y x` in noise, then `[get] y v` for the last name of every chain."""
    num_chains = int(rng.integers(1, min(4, (length - 1) // 16) + 1))
    hops = int(rng.integers(1, min(3, (length - 1) // (4 * num_chains) - 1) + 1))
    symbols = rng.permutation(vocabulary.symbols)
    names, values = symbols[: num_chains * hops].reshape(num_chains, hops), symbols[-num_chains:]
    chain = np.repeat(np.arange(num_chains), hops)
    order = rng.permutation(chain)  # chains interleave, each in its own order
    hop = np.array([np.count_nonzero(order[:i] == c) for i, c in enumerate(order)])
    sources = np.where(hop == 0, values[order], names[order, hop - 1])
    asked = rng.permutation(num_chains)

    def sentences(start: int, left: Ints, right: Ints) -> Ints:
        words = np.stack(np.broadcast_arrays(start, left, right), axis=1)
        return words.astype(np.int64)

    items = np.concatenate(
        [
            sentences(vocabulary.let, names[order, hop], sources),
            sentences(vocabulary.get, names[asked, -1], values[asked]),
        ]
    )
    room = length - 1 - items.size
    cuts = np.concatenate([np.sort(rng.integers(0, room + 1, len(order))), np.full(num_chains, room)])
    at = _item_indices(cuts, items.shape[1])
    tokens, weights = _begin(vocabulary, length), np.zeros(length, np.float32)
    tokens[1:] = rng.choice(symbols[num_chains * hops : -num_chains], length - 1)
    tokens[at] = items
    weights[at[-num_chains:, -1]] = ANSWER_WEIGHT
    return Window(tokens, weights)


def retrieval_document(
    length: int,
    *,
    haystack: Haystack,
    seed: int,
    vocabulary: Vocabulary,
    text: Ints | None = None,
    num_needles: int = 4,
    num_questions: int | None = None,
) -> RetrievalDocument:
    """Return an evaluation document of exactly `length` tokens with held-out keys and values.

    Needle i of n lies at a random place in the i-th of n equal parts of the haystack; questions (all needles unless
    `num_questions` says fewer) follow at the end in random order. `text` is the stream (tokens,) to cut a text haystack
    from: pass documents that were not trained on. A pure function of its arguments.
    """
    num_questions = num_needles if num_questions is None else num_questions
    if not 1 <= num_questions <= num_needles:
        raise InputError(f"{num_questions} questions about {num_needles} needles; ask between 1 and {num_needles}")
    room = length - 1 - NEEDLE_SIZE * (num_needles + num_questions)
    if room < 0:
        raise InputError(
            f"{num_needles} needles and {num_questions} questions do not fit into {length} tokens; "
            f"they need {length - room}"
        )
    if haystack == "text" and text is None:
        raise InputError("a text haystack needs `text`, a stream of tokens to cut it from")
    rng = np.random.default_rng((seed, length, num_needles, num_questions, haystack == "noise"))
    held_out = pairs("key", held_out=True)
    keys = held_out[rng.choice(len(held_out), num_needles, replace=False)]
    values = rng.choice(pairs("value", held_out=True), num_needles)
    edges = np.linspace(0, room + 1, num_needles + 1)
    starts = np.floor(rng.uniform(edges[:-1], edges[1:])).astype(np.int64)
    at = _item_indices(starts)
    questions_start = length - NEEDLE_SIZE * num_questions

    tokens = _begin(vocabulary, length)
    needles = _needles(vocabulary, keys, values)
    is_hay = np.ones(length, bool)
    is_hay[0] = False
    is_hay[at] = False
    is_hay[questions_start:] = False
    tokens[is_hay] = _haystack(rng, room, vocabulary, np.empty(0, np.int64) if text is None else text, haystack)[0]
    tokens[at] = needles
    asked = rng.permutation(num_needles)[:num_questions]
    questions = needles[asked]
    questions[:, 0] = vocabulary.get
    tokens[questions_start:] = questions.ravel()
    return RetrievalDocument(
        tokens,
        questions_start,
        tuple(
            Question(
                prompt=question[:-ANSWER_SIZE],
                answer=question[-ANSWER_SIZE:],
                answer_start=questions_start + NEEDLE_SIZE * i + NEEDLE_SIZE - ANSWER_SIZE,
                needle_start=int(at[needle, 0]),
            )
            for i, (question, needle) in enumerate(zip(questions, asked, strict=True))
        ),
    )


def text_slice(rng: np.random.Generator, text: Ints, length: int) -> Ints:
    """Return `length` tokens of the stream from a random start; a stream that is too short is read in a circle."""
    if len(text) == 0:
        raise InputError("the text to cut from is empty; pass at least one token")
    start = int(rng.integers(0, max(1, len(text) - length + 1)))
    return text[start : start + length] if length <= len(text) else np.resize(np.roll(text, -start), length)


def _begin(vocabulary: Vocabulary, length: int) -> Ints:
    tokens = np.empty(length, np.int64)
    tokens[0] = vocabulary.begin
    return tokens


def _needles(vocabulary: Vocabulary, keys: Ints, values: Ints) -> Ints:
    """Return `[set] k1 k2 v1 v2` for pairs of symbol indices (N, 2): (N, 5)."""
    needles = np.empty((len(keys), NEEDLE_SIZE), np.int64)
    needles[:, 0] = vocabulary.set
    needles[:, 1:3], needles[:, 3:] = vocabulary.symbols[keys], vocabulary.symbols[values]
    return needles


def _keys(rng: np.random.Generator, num: int, look_alike: bool) -> Ints:
    """Return `num` different training keys (num, 2); look-alikes are drawn from few symbols."""
    allowed = pairs("key", held_out=False)
    if look_alike:
        few = rng.permutation(NUM_SYMBOLS)[: 6 + num // 2]
        close = _training_key_table()[np.ix_(few, few)].nonzero()
        allowed = np.stack([few[close[0]], few[close[1]]], axis=1)
    return allowed[rng.choice(len(allowed), min(num, len(allowed)), replace=False)]


def _similar_keys(rng: np.random.Generator, num: int) -> Ints:
    """Return `num` different training keys (num, 2) with one of a few symbols on the same side."""
    allowed = pairs("key", held_out=False)
    shared = rng.permutation(NUM_SYMBOLS)[: 1 + num // 4]
    allowed = allowed[np.isin(allowed[:, rng.integers(2)], shared)]
    return allowed[rng.choice(len(allowed), num, replace=False)]


@cache
def _training_key_table() -> NDArray[np.bool_]:
    table = np.zeros((NUM_SYMBOLS, NUM_SYMBOLS), bool)
    table[tuple(pairs("key", held_out=False).T)] = True
    return table


def _haystack(
    rng: np.random.Generator, length: int, vocabulary: Vocabulary, text: Ints, haystack: Haystack
) -> tuple[Ints, float]:
    """Return the haystack's tokens and their weight as targets: nothing predicts random symbols."""
    if haystack == "noise":
        return rng.choice(vocabulary.symbols, length), 0.0
    if haystack == "text":
        return text_slice(rng, text, length), 1.0
    raise InputError(f"haystack {haystack!r} is unknown; one of text, noise")


def _item_indices(cuts: Ints, size: int = NEEDLE_SIZE) -> Ints:
    """Return the indices (N, size) of items put into a haystack before its tokens `cuts`, after `<|begin|>`."""
    starts = 1 + cuts + size * np.arange(len(cuts))
    return starts[:, None] + np.arange(size)


# what a recipe can mix, by name: (generator, tokens of a window, vocabulary, text) -> window
TASKS: dict[str, Callable[[np.random.Generator, int, Vocabulary, Ints], Window]] = {
    "text": text_window,
    "text_retrieval": lambda rng, length, words, text: retrieval_window(rng, length, words, text, "text"),
    "noise_retrieval": lambda rng, length, words, text: retrieval_window(rng, length, words, text, "noise"),
    "similar_keys": lambda rng, length, words, text: retrieval_window(
        rng, length, words, text, "noise", similar_keys=True
    ),
    "copy": lambda rng, length, words, text: copy_window(rng, length, words),
    "variable_tracking": lambda rng, length, words, text: variable_window(rng, length, words),
}
