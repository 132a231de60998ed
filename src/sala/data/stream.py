"""The stream of a stage: packed windows of weighted sources, the same for any number of ranks, resumed exactly."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sala.data.packing import Piece, cut, pack
from sala.data.shards import Shards
from sala.errors import InputError, RecipeError, nearest

Ints = NDArray[np.int64]

# of a token that is not predicted; torch's cross-entropy leaves it out
NO_LABEL = -100

# Documents are packed in blocks of at least so many pieces and windows: more would leave less padding (a block's last
# windows stay half empty) and cost more to plan again on resuming. Drawn in steps of BLOCK_STEP documents.
BLOCK_PIECES, BLOCK_WINDOWS, BLOCK_STEP = 2048, 64, 64

Weights = Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class Source:
    """Tokenised documents, and how often those of a length are read.

    length_weights: smallest length in tokens -> how often an epoch reads a document of at least that length (and below
    the next one): `{0: 1, 32_768: 4}` reads long documents four times, `{0: 0.25, 32_768: 1}` a quarter of the short
    ones, other ones each epoch. Below the smallest key documents are not read.

    Raises:
        RecipeError: a length or weight is negative, or no document has a weight.
    """

    shards: Shards
    length_weights: Mapping[int, float] = field(default_factory=lambda: {0: 1.0})

    def __post_init__(self) -> None:
        for length, weight in self.length_weights.items():
            if length < 0 or not 0 <= weight < math.inf:
                raise RecipeError(f"length_weights {length}: {weight}; expected a length and a weight of 0 or more")
        if not any(count and weight for count, weight in zip(self._survey[0], self._bucket_weights, strict=True)):
            raise RecipeError(f"no document of {self.shards.folder} has a length with a weight above 0")

    @cached_property
    def edges(self) -> Ints:
        return np.array(sorted(self.length_weights), np.int64)

    @cached_property
    def _bucket_weights(self) -> NDArray[np.float64]:
        """Weight of each bucket; bucket 0 is below all edges."""
        return np.array([0.0, *(self.length_weights[edge] for edge in self.edges.tolist())])

    @cached_property
    def _survey(self) -> tuple[Ints, Ints]:
        """Documents and tokens of each bucket."""
        documents, tokens = (np.zeros(len(self.edges) + 1, np.int64) for _ in range(2))
        for lengths in self.shards.chunks_of_lengths():
            buckets = np.searchsorted(self.edges, lengths, side="right")
            documents += np.bincount(buckets, minlength=len(documents))
            np.add.at(tokens, buckets, lengths)
        return documents, tokens

    @property
    def max_copies(self) -> int:
        return math.ceil(self._bucket_weights.max())

    @property
    def tokens_per_epoch(self) -> float:
        """Expected tokens that one epoch reads."""
        return float(self._survey[1] @ self._bucket_weights)

    def repeats(self, lengths: Ints) -> NDArray[np.float64]:
        """Return how often an epoch reads documents of these lengths, (n,) for (n,)."""
        return self._bucket_weights[np.searchsorted(self.edges, lengths, side="right")]

    def describe(self, window: int) -> str:
        """Say what there is: documents, tokens, those longer than a window, and each bucket of lengths."""
        longer = sum(int(np.count_nonzero(lengths > window)) for lengths in self.shards.chunks_of_lengths())
        lines = [
            f"{self.shards.folder}: {self.shards.num_documents:,} documents, {self.shards.num_tokens:,} tokens, "
            f"{self.tokens_per_epoch:,.0f} an epoch; {longer:,} documents are longer than {window:,} and are cut"
        ]
        if len(self.edges) > 1:
            for low, weight, documents, tokens in zip(
                [0, *self.edges.tolist()], self._bucket_weights, *self._survey, strict=True
            ):
                if documents:
                    lines.append(
                        f"  from {low:,} tokens: {documents:,} documents, {tokens:,} tokens, weight {weight:g}"
                    )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Windows of packed documents: (B, T) each, or end to end as one row (1, B * T) with `cu_seqlens`.

    `labels[b, t]` is `input_ids[b, t]` as a target, to be predicted from the tokens before it; -100 for what is not
    predicted: the first token of a document or of a piece of one, what the data has no loss on, and padding.
    """

    input_ids: Ints  # (B, T)
    labels: Ints  # (B, T)
    sources: tuple[str, ...]  # (B,)
    pieces: tuple[tuple[Piece, ...], ...]  # of each window

    @property
    def cu_seqlens(self) -> NDArray[np.int32]:
        """Ends of the sequences (N + 1,) when all windows are laid end to end; padding is a sequence of its own."""
        length = self.input_ids.shape[1]
        starts = [
            [row * length + start for start in accumulate((p.length for p in pieces), initial=0) if start < length]
            for row, pieces in enumerate(self.pieces)
        ]
        return np.array([*(start for row in starts for start in row), self.input_ids.size], np.int32)

    @property
    def loss_weights(self) -> NDArray[np.float32]:
        """The weight (B, T) of each token as a target, as the losses of `sala.train` take it."""
        return (self.labels != NO_LABEL).astype(np.float32)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(piece.length for pieces in self.pieces for piece in pieces)

    @property
    def names(self) -> tuple[str, ...]:
        """What each window holds, for errors: the source and its document ids."""
        return tuple(
            f"{source} {', '.join(_name(piece) for piece in pieces)}"
            for source, pieces in zip(self.sources, self.pieces, strict=True)
        )


def _name(piece: Piece) -> str:
    return f"{piece.document}[{piece.start}:{piece.end}]"


class Stream(Iterator[PackedBatch]):
    """The batches of one stage on one rank, `steps` of them.

    Every window holds documents of one source, drawn by weight. The windows of a stage are numbered; a step takes the
    next `batch` of them, and rank r of n the r-th, (r + n)-th ... of these. All ranks plan all windows, from lengths
    alone, and read the tokens of their own. So the state is the same on every rank and goes on with any number of them.

    An epoch of a source reads every document as often as its length's weight says, in an order drawn anew each time.
    A document that fits a window is never cut: it is packed where it fits best, windows end in padding. A longer one is
    cut into full windows and a rest, each of which is a sequence of its own.

    Args:
        weights: each source's share of the windows: a number, or those at equally spaced moments of the stage, straight
            in between, as in a recipe.
        length: tokens of a window.
        batch: windows of a step over all ranks.

    Raises:
        RecipeError: a source without weight or a weight without source, no weight at some time, or sizes that do not fit.
        InputError: sources made with different tokenizers.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Weights,
        *,
        length: int,
        batch: int,
        steps: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ):
        for name, value, least in (
            ("length", length, 2),
            ("batch", batch, 1),
            ("steps", steps, 1),
            ("ranks", ranks, 1),
        ):
            if value < least:
                raise RecipeError(f"{name} {value} must be at least {least}")
        if seed < 0:
            raise RecipeError(f"seed {seed} must not be negative")
        if batch % ranks:
            below, above = batch // ranks * ranks, (batch // ranks + 1) * ranks
            raise RecipeError(
                f"batch {batch} does not divide among {ranks} ranks; expected {f'{below} or ' if below else ''}{above}"
            )
        if not 0 <= rank < ranks:
            raise RecipeError(f"rank {rank} is not one of {ranks}")
        tokenizers = {source.shards.header["tokenizer"]["sha256"]: name for name, source in sources.items()}
        if len(tokenizers) > 1:
            raise InputError(f"sources {' and '.join(tokenizers.values())} were tokenised with different tokenizers")
        self.length, self.batch, self.steps, self.seed = length, batch, steps, seed
        self.rank, self.ranks = rank, ranks
        self._sources = dict(sources)
        self._weights = _points(weights, self._sources)
        self._window = self._tokens = 0
        self._cursors = {
            name: _Cursor(source, length, (seed, number))
            for number, (name, source) in enumerate(self._sources.items(), start=1)
        }

    @property
    def num_windows(self) -> int:
        """Windows of the whole stage."""
        return self.batch * self.steps

    @property
    def tokens(self) -> int:
        """Tokens given out so far on all ranks, without padding."""
        return self._tokens

    @property
    def padding(self) -> float:
        """The part of the windows given out so far that is padding."""
        return 1 - self._tokens / (self._window * self.length) if self._window else 0.0

    @property
    def epochs(self) -> dict[str, int]:
        """Epochs of each source that are complete."""
        return {name: cursor.epoch for name, cursor in self._cursors.items()}

    def __next__(self) -> PackedBatch:
        if self._window + self.batch > self.num_windows:
            raise StopIteration
        chosen = []
        numbers = np.arange(self._window, self._window + self.batch)
        for number, name in enumerate(self._sources_of(numbers), start=self._window):
            pieces = next(self._cursors[name])
            self._tokens += sum(piece.length for piece in pieces)
            if number % self.ranks == self.rank:
                chosen.append((name, tuple(pieces)))
        self._window += self.batch
        return self._read(chosen)

    def state_dict(self) -> dict[str, Any]:
        """Return the position between two batches, small and plain (it can be JSON), the same on every rank."""
        return {
            "window": self._window,
            "tokens": self._tokens,
            "sources": {name: cursor.state_dict() for name, cursor in self._cursors.items()},
            "made_of": self._made_of(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the number of ranks may be another, and so may the batch while the windows stay as many.

        Raises:
            InputError: the state is of other data: the first difference is named.
        """
        mine = self._made_of()
        for name, value in mine.items():
            if (theirs := state["made_of"].get(name)) != value:
                raise InputError(
                    f"the data's position cannot be taken up: {name} was {theirs!r} and is {value!r} now; expected "
                    "the run's own recipe and shards"
                )
        if (left := self.num_windows - state["window"]) % self.batch:
            raise InputError(f"{left} windows are left of the stage, which a batch of {self.batch} does not divide")
        self._window, self._tokens = state["window"], state["tokens"]
        for name, cursor in self._cursors.items():
            cursor.load_state_dict(state["sources"][name])

    def describe(self) -> str:
        """Say what the stage reads: its sources, how long documents fare, and how often each source is read."""
        weights = self._weights_at(np.linspace(0, self.num_windows - 1, 1001))
        shares = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
        lines = []
        for (name, source), share in zip(self._sources.items(), shares.tolist(), strict=True):
            epochs = share * self.num_windows * self.length / source.tokens_per_epoch
            lines.append(f"{name}: {share:.1%} of the windows, {epochs:.2f} epochs of")
            lines.append(f"  {source.describe(self.length)}")
        return "\n".join(lines)

    def _weights_at(self, windows: NDArray) -> NDArray[np.float64]:
        """Return the weights (N, sources) at windows (N,) of the stage."""
        progress = windows / max(1, self.num_windows - 1)
        points = self._weights.values()
        return np.stack([np.interp(progress, np.linspace(0, 1, len(at)), at) for at in points], axis=1)

    def _sources_of(self, windows: Ints) -> list[str]:
        edges = self._weights_at(windows).cumsum(axis=1)
        drawn = _uniform(windows, (self.seed, 0)) * edges[:, -1]
        names = list(self._weights)
        return [names[i] for i in (drawn[:, None] >= edges).sum(axis=1)]

    def _read(self, windows: Sequence[tuple[str, tuple[Piece, ...]]]) -> PackedBatch:
        pad = next(iter(self._sources.values())).shards.pad
        input_ids = np.full((len(windows), self.length), pad, np.int64)
        labels = np.full_like(input_ids, NO_LABEL)
        for row, (name, pieces) in enumerate(windows):
            at = 0
            for piece in pieces:
                ids, targets = self._sources[name].shards.read(*piece)
                part = slice(at, at + len(ids))
                input_ids[row, part] = ids
                predicted = np.ones(len(ids), bool) if targets is None else targets
                predicted[0] = False
                labels[row, part][predicted] = ids[predicted]
                at += len(ids)
        return PackedBatch(input_ids, labels, tuple(name for name, _ in windows), tuple(p for _, p in windows))

    def _made_of(self) -> dict[str, Any]:
        """What the order of the windows depends on, as JSON would give it back."""
        return {
            "seed": self.seed,
            "length": self.length,
            "windows": self.num_windows,
            "weights": self._weights,
            "sources": {
                name: [
                    source.shards.sha256,
                    [[length, source.length_weights[length]] for length in sorted(source.length_weights)],
                ]
                for name, source in self._sources.items()
            },
        }


def _points(weights: Weights, sources: Mapping[str, Source]) -> dict[str, list[float]]:
    """Return the weights of each source at equally spaced moments, at least one, in the order of the sources."""
    points = {
        name: [float(w) for w in (weight if isinstance(weight, Sequence) else [weight])]
        for name, weight in weights.items()
    }
    for name, at in points.items():
        if name not in sources:
            raise RecipeError(f"data source {name!r} is unknown; known: {', '.join(sources)}{nearest(name, sources)}")
        if not at or not all(0 <= weight < math.inf for weight in at):
            raise RecipeError(f"data weight {name}={weights[name]!r} must be 0 or more, or a list of such")
    if missing := [name for name in sources if name not in points]:
        raise RecipeError(f"data source {', '.join(missing)} has no weight; leave it out, or give it one")
    moments = {i / max(1, len(at) - 1) for at in points.values() for i in range(len(at))}
    for moment in sorted(moments):
        if not sum(np.interp(moment, np.linspace(0, 1, len(at)), at) for at in points.values()) > 0:
            raise RecipeError(f"data weights are all 0 at {moment:.0%} of the stage; give one source a weight there")
    return {name: points[name] for name in sources}


class _Cursor:
    """The windows of one source, one after the other, epoch after epoch.

    An epoch has a slot for every copy that a document may have; they come in an order drawn for the epoch. The
    position is the epoch, the slot where the current block begins, and the window in the block.
    """

    def __init__(self, source: Source, length: int, key: tuple[int, int]):
        self._source, self._length, self._key = source, length, key
        self._num_slots = source.shards.num_documents * source.max_copies
        self.epoch = self._slot = self._at = 0
        self._windows: list[list[Piece]] | None = None
        self._end = 0  # the slot after the current block

    def __next__(self) -> list[Piece]:
        if self._windows is None:
            self._plan()
        # an epoch whose copies are few by chance may have none left for a block
        while self._at == len(self._windows or ()):
            self._slot, self._at = self._end, 0
            if self._slot >= self._num_slots:
                self.epoch, self._slot = self.epoch + 1, 0
            self._plan()
        assert self._windows is not None
        self._at += 1
        return self._windows[self._at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "slot": self._slot, "window": self._at}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self._slot, self._at = state["epoch"], state["slot"], state["window"]
        self._windows = None

    def _plan(self) -> None:
        """Pack the block of documents that begins at the slot."""
        shards = self._source.shards
        shuffle = Shuffle(self._num_slots, (*self._key, self.epoch))
        pieces: list[Piece] = []
        tokens, slot = 0, self._slot
        while slot < self._num_slots and (len(pieces) < BLOCK_PIECES or tokens < BLOCK_WINDOWS * self._length):
            slots = shuffle(np.arange(slot, min(slot + BLOCK_STEP, self._num_slots)))
            slot += len(slots)
            copies, documents = np.divmod(slots, shards.num_documents)
            lengths = shards.lengths(documents)
            # a weight of 2.3 is two copies, and a third in three of ten epochs
            chances = _uniform(documents, (*self._key, self.epoch))
            present = copies < np.floor(self._source.repeats(lengths) + chances)
            for document, length in zip(documents[present].tolist(), lengths[present].tolist(), strict=True):
                pieces += cut(document, length, self._length)
                tokens += length
        self._end = slot
        windows = pack(pieces, self._length)
        order = np.random.default_rng((*self._key, self.epoch, self._slot)).permutation(len(windows))
        self._windows = [windows[i] for i in order.tolist()]


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Return 64 bits that depend on every bit of each value and of the key: the end of splitmix64."""
    # products wrap, as they should
    mixed = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _keys(key: Sequence[int], count: int) -> NDArray[np.uint64]:
    return np.asarray(np.random.SeedSequence(list(key)).generate_state(count, np.uint64), np.uint64)


def _uniform(values: Ints, key: Sequence[int]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each value, a pure function of the value and the key."""
    bits = _mix(values.astype(np.uint64), _keys(key, 1)[0]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


class Shuffle:
    """A random order of 0 to n - 1 that takes no memory: `Shuffle(n, key)(indices)` are the numbers at these places.

    A Feistel network over the next power of four, walked on until a number is below n. Any place of an order of a
    billion documents is computed at once, where a table would take 8 GB a rank.
    """

    ROUNDS = 4

    def __init__(self, size: int, key: Sequence[int]):
        self._size = size
        self._half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        # one more than what `_uniform` takes of the same key
        self._keys = _keys(key, self.ROUNDS + 1)[1:]

    def __call__(self, indices: Ints) -> Ints:
        numbers = self._permute(indices.astype(np.uint64))
        while (outside := numbers >= self._size).any():
            numbers[outside] = self._permute(numbers[outside])
        return numbers.astype(np.int64)

    def _permute(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right, key) & self._mask)
        return (left << self._half) | right
