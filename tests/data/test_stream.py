"""Laws of the stream: packed windows, weights, and a position from which the very next window comes."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import PAD, make_shards, tokens_of
from sala.data import NO_LABEL, Shards, Source, Stream
from sala.data import stream as stream_module
from sala.data.packing import Piece
from sala.data.stream import Shuffle
from sala.errors import InputError, RecipeError

WINDOW = 16
LENGTHS = np.random.default_rng(0).integers(1, 40, 300).tolist()


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Blocks so small that an epoch has several."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"BLOCK_PIECES": 40, "BLOCK_WINDOWS": 8, "BLOCK_STEP": 16}.items():
            patch.setattr(stream_module, name, value)
        yield


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make_shards(tmp_path_factory.mktemp("shards") / "code", LENGTHS, shard_tokens=1000)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make_shards(tmp_path_factory.mktemp("shards") / "web", LENGTHS[:20], with_loss=True)


Make = Callable[..., Stream]


@pytest.fixture(scope="module")
def make(code: Shards, web: Shards) -> Make:
    def stream(**changes: Any) -> Stream:
        settings = {
            "sources": {"code": Source(code), "web": Source(web)},
            "weights": {"code": 2, "web": 1},
            "length": WINDOW,
            "batch": 12,
            "steps": 20,
            "seed": 0,
        }
        return Stream(**(settings | changes))

    return stream


def windows_of(streams: Sequence[Stream], steps: int) -> list[tuple[str, tuple[Piece, ...]]]:
    """The windows that the ranks see, in the order of the stage."""
    windows = []
    for _ in range(steps):
        batches = [next(stream) for stream in streams]
        for row in range(len(batches[0].pieces)):
            windows += [(batch.sources[row], batch.pieces[row]) for batch in batches]
    return windows


def test_windows_hold_their_documents_end_to_end(make: Make) -> None:
    for batch in make():
        for ids, pieces in zip(batch.input_ids, batch.pieces, strict=True):
            expected = [tokens_of(p.document, p.end)[p.start :] for p in pieces]
            filled = np.concatenate(expected)
            assert (ids[: len(filled)] == filled).all()
            assert (ids[len(filled) :] == PAD).all()


def test_sequences_end_where_documents_and_windows_do(make: Make) -> None:
    for batch in make():
        ends = batch.cu_seqlens.tolist()
        assert (ends[0], ends[-1]) == (0, batch.input_ids.size)
        rows = [batch.input_ids.ravel()[start:end] for start, end in pairwise(ends)]
        assert [len(row) for row in rows if row[0] != PAD] == [p.length for pieces in batch.pieces for p in pieces]
        assert all(len(row) > 0 and (np.diff(row) == (0 if row[0] == PAD else 1)).all() for row in rows)


def test_the_first_token_of_a_sequence_and_padding_are_not_predicted(make: Make) -> None:
    for batch in make():
        labels, ids = batch.labels.ravel(), batch.input_ids.ravel()
        assert (labels[batch.cu_seqlens[:-1]] == NO_LABEL).all()
        assert (labels[ids == PAD] == NO_LABEL).all()
        assert ((labels == ids) | (labels == NO_LABEL)).all()
        assert (batch.loss_weights.ravel() == (labels != NO_LABEL)).all()


def test_all_other_tokens_are_predicted_where_the_data_says_so(make: Make) -> None:
    for batch in make():
        for row, source in enumerate(batch.sources):
            at = np.cumsum([0, *(p.length for p in batch.pieces[row])])[:-1]
            inner = np.ones(WINDOW, bool)
            inner[at] = False
            inner[batch.input_ids[row] == PAD] = False
            if source == "web":
                inner &= batch.input_ids[row] % 2 == 0
            assert ((batch.labels[row] != NO_LABEL) == inner).all()


def test_an_epoch_reads_every_token_once(code: Shards) -> None:
    stream = Stream({"code": Source(code)}, {"code": 1}, length=WINDOW, batch=1, steps=10_000, seed=0)
    seen: Counter[int] = Counter()
    while not stream.epochs["code"]:
        position = stream.state_dict()["sources"]["code"]["epoch"]
        batch = next(stream)
        if stream.epochs["code"] == position:
            seen.update(batch.input_ids[batch.input_ids != PAD].tolist())
    assert seen == Counter(np.concatenate([tokens_of(d, n) for d, n in enumerate(LENGTHS)]).tolist())


def test_a_document_that_fits_is_never_cut_and_a_longer_one_into_full_windows(make: Make) -> None:
    for batch in make():
        for piece in (piece for pieces in batch.pieces for piece in pieces):
            length = LENGTHS[piece.document]
            assert piece.start % WINDOW == 0
            assert piece.end == min(piece.start + WINDOW, length)


def test_little_is_padding(make: Make, code: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "BLOCK_PIECES", 400)
    stream = make(sources={"code": Source(code)}, weights={"code": 1}, steps=100)
    tokens = sum(batch.num_tokens for batch in stream)
    assert tokens == stream.tokens
    assert stream.padding == pytest.approx(1 - tokens / (stream.num_windows * WINDOW))
    assert stream.padding < 0.05


def test_a_stage_ends_after_its_steps(make: Make) -> None:
    assert len(list(make())) == 20


def test_seeds_epochs_and_sources_have_different_orders(make: Make) -> None:
    assert windows_of([make(seed=0)], 5) != windows_of([make(seed=1)], 5)
    first = [pieces for _, pieces in windows_of([make(weights={"code": 0, "web": 1})], 20)]
    again = first.index(first[0], 1) if first[0] in first[1:] else len(first)
    assert first[:again] != first[again : 2 * again]


@settings(max_examples=40)
@given(
    steps=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    ranks=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=4, max_size=4),
    seed=st.integers(0, 2**32),
    changing=st.booleans(),
)
def test_resuming_on_other_ranks_skips_and_repeats_nothing(
    make: Make, steps: list[int], ranks: list[int], seed: int, changing: bool
) -> None:
    weights = {"code": [1, 0, 3], "web": 1 if changing else [2, 0.5, 1]}
    whole = windows_of([make(seed=seed, weights=weights)], sum(steps))
    state, resumed = None, []
    for count, num_ranks in zip(steps, ranks, strict=False):
        streams = [make(seed=seed, weights=weights, rank=rank, ranks=num_ranks) for rank in range(num_ranks)]
        if state is not None:
            for stream in streams:
                stream.load_state_dict(json.loads(state))
        resumed += windows_of(streams, count)
        # the same on every rank, and plain enough for JSON
        states = {json.dumps(stream.state_dict()) for stream in streams}
        assert len(states) == 1
        state = states.pop()
    assert resumed == whole


def test_resuming_is_exact_at_every_window_over_blocks_and_epochs(code: Shards) -> None:
    def stream() -> Stream:
        source = Source(code, {0: 0.5, 20: 2.3})
        return Stream({"code": source}, {"code": 1}, length=WINDOW, batch=1, steps=2500, seed=3)

    through = stream()
    for _ in range(0, 2500, 47):
        state = through.state_dict()
        expected = [next(through).pieces for _ in range(47) if through.state_dict()["window"] < 2500]
        again = stream()
        again.load_state_dict(state)
        assert [next(again).pieces for _ in range(len(expected))] == expected
    assert through.epochs["code"] >= 2


def test_a_resumed_stage_may_take_larger_batches(make: Make) -> None:
    whole = windows_of([make()], 20)
    stream = make()
    start = windows_of([stream], 10)
    larger = make(batch=24, steps=10)
    larger.load_state_dict(stream.state_dict())
    assert start + windows_of([larger], 5) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"length": 17}, "length was 16 and is 17 now"),
        ({"steps": 21}, "windows was 240 and is 252 now"),
        ({"weights": {"code": 1, "web": 1}}, "weights was"),
    ],
)
def test_a_position_in_other_data_is_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    state = json.loads(json.dumps(make().state_dict()))
    with pytest.raises(InputError, match=message):
        make(**changes).load_state_dict(state)


def test_a_position_in_other_shards_is_refused(make: Make, code: Shards, tmp_path: Path) -> None:
    state = make().state_dict()
    other = make_shards(tmp_path / "other", LENGTHS[:19], with_loss=True)
    with pytest.raises(InputError, match="sources was"):
        make(sources={"code": Source(code), "web": Source(other)}).load_state_dict(state)


def test_windows_come_by_weight(make: Make) -> None:
    sources = Counter(name for batch in make(steps=200) for name in batch.sources)
    assert sources["code"] / 2400 == pytest.approx(2 / 3, abs=0.04)


def test_weights_change_within_a_stage(make: Make) -> None:
    stream = make(weights={"code": [1, 0, 0], "web": [0, 1, 1]}, steps=400)
    is_web = np.array([name == "web" for batch in stream for name in batch.sources])
    assert is_web[2400:].all()
    shares = is_web[:2400].reshape(4, -1).mean(axis=1)
    assert shares == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8], abs=0.06)


def documents_of_an_epoch(source: Source, epochs: int) -> Counter[int]:
    stream = Stream({"it": source}, {"it": 1}, length=64, batch=1, steps=10_000, seed=0)
    seen: Counter[int] = Counter()
    while True:
        pieces = next(stream).pieces[0]
        if stream.epochs["it"] == epochs:
            return seen
        seen.update(piece.document for piece in pieces)


def test_long_documents_are_read_as_often_as_their_length_says(code: Shards) -> None:
    seen = documents_of_an_epoch(Source(code, {0: 1, 20: 3, 30: 0}), epochs=1)
    expected = {d: 1 if n < 20 else 3 for d, n in enumerate(LENGTHS) if n < 30}
    assert seen == Counter(expected)


def test_a_fraction_of_a_weight_reads_other_documents_each_epoch(code: Shards) -> None:
    seen = documents_of_an_epoch(Source(code, {0: 0.5, 20: 1.25}), epochs=8)
    short = [seen[d] for d, n in enumerate(LENGTHS) if n < 20]
    long = [seen[d] for d, n in enumerate(LENGTHS) if n >= 20]
    assert np.mean(short) == pytest.approx(4, abs=0.4)
    assert np.mean(long) == pytest.approx(10, abs=0.4)
    assert len(set(short)) > 3
    assert min(long) >= 8


def test_what_a_stage_reads_is_described(make: Make, code: Shards, web: Shards) -> None:
    text = make(sources={"code": Source(code, {0: 1, 20: 2}), "web": Source(web)}).describe()
    longer = sum(n > WINDOW for n in LENGTHS)
    assert f"{longer} documents are longer than 16 and are cut" in text
    assert "from 20 tokens" in text
    assert "weight 2" in text
    epochs = 80 * WINDOW / sum(LENGTHS[:20])
    assert f"web: 33.3% of the windows, {epochs:.2f} epochs of" in text


@settings(max_examples=60)
@given(size=st.integers(1, 700), key=st.integers(0, 2**32))
def test_a_shuffle_is_an_order_of_all_numbers(size: int, key: int) -> None:
    shuffle = Shuffle(size, (key,))
    assert sorted(shuffle(np.arange(size)).tolist()) == list(range(size))


def test_a_shuffle_spreads_numbers_evenly() -> None:
    """The place of a number is uniform over keys, and neighbours are independent."""
    places = np.array([Shuffle(100, (key,))(np.arange(100)) for key in range(600)])
    for column in (0, 1, 50, 99):
        counts = np.bincount(places[:, column] // 10, minlength=10)
        assert ((counts - 60) ** 2 / 60).sum() < 30  # chi-squared with 9 degrees: p = 0.0004
    pairs = np.corrcoef(places[:, 0], places[:, 1])[0, 1]
    assert abs(pairs) < 0.15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"cod": 1, "web": 1}}, "'cod' is unknown; known: code, web; did you mean 'code'"),
        ({"weights": {"code": -1, "web": 1}}, "code=-1 must be 0 or more"),
        ({"weights": {"code": [], "web": 1}}, "must be 0 or more, or a list"),
        ({"weights": {"code": 1}}, "data source web has no weight"),
        ({"weights": {"code": 0, "web": [1, 1, 0]}}, "all 0 at 100% of the stage"),
        ({"length": 1}, "length 1 must be at least 2"),
        ({"batch": 10, "ranks": 4}, "batch 10 does not divide among 4 ranks; expected 8 or 12"),
        ({"batch": 3, "ranks": 4}, "expected 4"),
        ({"rank": 1}, "rank 1 is not one of 1"),
        ({"seed": -1}, "seed -1 must not be negative"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("weights", "message"),
    [({0: -1.0}, "length_weights 0: -1.0"), ({1000: 1.0}, "no document of .* has a length"), ({}, "no document of")],
)
def test_length_weights_that_cannot_be_are_refused(code: Shards, weights: dict[int, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Source(code, weights)


def test_sources_of_different_tokenizers_are_refused(make: Make, code: Shards, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", LENGTHS, sha256="another")
    with pytest.raises(InputError, match="different tokenizers"):
        make(sources={"code": Source(code), "web": Source(other)})


def test_a_window_is_named_by_its_source_and_documents(make: Make) -> None:
    batch = next(make())
    for name, source, pieces in zip(batch.names, batch.sources, batch.pieces, strict=True):
        assert name.startswith(source)
        assert all(f"{p.document}[{p.start}:{p.end}]" in name for p in pieces)
