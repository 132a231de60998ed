"""Laws of packing documents into windows."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sala.data.packing import Piece, cut, pack
from sala.data.stream import BLOCK_PIECES, BLOCK_WINDOWS

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def pieces_of(lengths: list[int], window: int) -> list[Piece]:
    return [piece for document, length in enumerate(lengths) for piece in cut(document, length, window)]


def test_a_document_that_fits_is_one_piece() -> None:
    assert cut(7, 8, 8) == [Piece(7, 0, 8)]


def test_a_longer_document_is_full_windows_and_a_rest() -> None:
    assert cut(7, 20, 8) == [Piece(7, 0, 8), Piece(7, 8, 16), Piece(7, 16, 20)]


@given(LENGTHS, st.integers(2, 50))
def test_every_piece_is_in_one_window_and_windows_hold_no_more_than_they_can(lengths: list[int], window: int) -> None:
    pieces = pieces_of(lengths, window)
    windows = pack(pieces, window)
    assert Counter(piece for pieces in windows for piece in pieces) == Counter(pieces)
    assert all(0 < sum(piece.length for piece in pieces) <= window for pieces in windows)


@given(LENGTHS, st.integers(2, 50))
def test_pieces_of_a_window_keep_their_order(lengths: list[int], window: int) -> None:
    for pieces in pack(pieces_of(lengths, window), window):
        assert pieces == sorted(pieces)


@given(LENGTHS, st.integers(2, 50))
def test_no_two_windows_would_fit_into_one(lengths: list[int], window: int) -> None:
    filled = sorted(sum(piece.length for piece in pieces) for pieces in pack(pieces_of(lengths, window), window))
    assert len(filled) == 1 or filled[0] + filled[1] > window


def test_small_documents_fill_what_large_ones_leave() -> None:
    assert len(pack(pieces_of([7, 1, 6, 2, 5, 3], 8), 8)) == 3


@pytest.mark.parametrize("window", [512, 4096, 32_768, 131_072, 524_288])
def test_blocks_of_documents_with_the_lengths_of_text_leave_little_room(window: int) -> None:
    rng = np.random.default_rng(0)
    # log-normal, about 1,000 tokens on average, a few of a hundred times as many
    lengths = [int(n) + 1 for n in np.exp(rng.normal(6.3, 1.1, 2 * BLOCK_WINDOWS * window // 1000 + BLOCK_PIECES))]
    pieces: list[Piece] = []
    used = 0
    for document, length in enumerate(lengths):
        if len(pieces) >= BLOCK_PIECES and used >= BLOCK_WINDOWS * window:
            break
        pieces += cut(document, length, window)
        used += length
    assert used >= 0.98 * len(pack(pieces, window)) * window
