"""Documents into windows: cut what is longer than a window, put the rest whole where it fits best."""

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple


class Piece(NamedTuple):
    """Tokens `start` to `end` of a document."""

    document: int
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


def cut(document: int, length: int, window: int) -> list[Piece]:
    """Return a document of `length` tokens as pieces: whole if it fits, else full windows and what remains."""
    return [Piece(document, start, min(start + window, length)) for start in range(0, length, window)]


def pack(pieces: Iterable[Piece], window: int) -> list[list[Piece]]:
    """Return windows of at most `window` tokens that hold every piece whole, in few windows.

    Best fit, the longest first: each piece goes where the least room stays. Pieces of a window keep their order.
    Source: Ding et al., Fewer Truncations Improve Language Modeling (arXiv 2404.10830).
    """
    windows: list[list[tuple[int, Piece]]] = []
    # rooms that some window has, and the windows that have each
    rooms: list[int] = []
    with_room: dict[int, list[int]] = {}
    for number, piece in sorted(enumerate(pieces), key=lambda item: -item[1].length):
        at = bisect_left(rooms, piece.length)
        if at == len(rooms):
            windows.append([])
            chosen, room = len(windows) - 1, window
        else:
            room = rooms[at]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        windows[chosen].append((number, piece))
        room -= piece.length
        assert room >= 0
        if room:
            if room not in with_room:
                insort(rooms, room)
            with_room.setdefault(room, []).append(chosen)
    return [[piece for _, piece in sorted(filled)] for filled in windows]
