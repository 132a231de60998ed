"""One request as the scheduler sees it: its tokens, how many of them are read, and where its reading can be resumed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sala.engine.pages import digests

Finish = Literal["end", "stop", "length", "cancelled", "error"]
# inside a long prompt states are kept at distances of this part of the way so far
GROWTH = 8
# message ends that are closer to each other share one snapshot
MESSAGE_DISTANCE = 256
# prompts of fewer tokens are read again faster than their states are found
LONG_PROMPT = 1024


@dataclass(eq=False)
class Request:
    """A prompt and the answer so far.

    ends: lengths at which messages of the prompt end; states are kept there.
    whole: the caller wants something of every token of the prompt: no prefix is reused.
    payload: the engine's. tokens_per_s: how fast it was read last.
    max_new_tokens: longest answer. read: how many of `tokens` the sequence holds.
    cached: how many tokens of the prompt were not read but found; miss: why not more.
    sequence: the runner's, None while waiting. places: the numbers of its pages, in order.
    """

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    page_size: int
    ends: Sequence[int] = ()
    whole: bool = False
    payload: Any = None
    output: list[int] = field(default_factory=list)
    read: int = 0
    cached: int = 0
    miss: str = ""
    sequence: Any = None
    places: list[int] = field(default_factory=list)
    states: Any = None
    mark: Any = None
    finish: Finish | None = None
    cancelled: bool = False
    preemptions: int = 0
    tokens_per_s: float | None = None
    arrived_s: float = 0.0
    admitted_s: float | None = None

    def __post_init__(self) -> None:
        self.pages = digests(self.prompt, self.page_size)
        self.stops = snapshot_points(len(self.prompt), self.page_size, self.ends)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def is_reading(self) -> bool:
        """Whether tokens of the prompt, or of an answer that was interrupted, are still to be read."""
        return self.length - self.read > 1 or not self.output

    def slice(self, start: int, end: int) -> tuple[int, ...]:
        """Return the tokens from `start` to `end`, of prompt and answer."""
        size = len(self.prompt)
        return (*self.prompt[start:end], *self.output[max(0, start - size) : max(0, end - size)])

    def page_digests(self) -> list[bytes]:
        """Return the digests of all full pages, those of the answer included."""
        return digests(self.slice(len(self.pages) * self.page_size, self.length), self.page_size, self.pages)

    def next_stop(self) -> int:
        """Return the next length at which reading has to pause: a snapshot is due, or all is read."""
        return next((stop for stop in self.stops if stop > self.read), self.length)

    def add_stop(self, length: int) -> None:
        self.stops = sorted({*self.stops, length})


def snapshot_points(length: int, page_size: int, ends: Sequence[int] = ()) -> list[int]:
    """Return the lengths, all ends of pages, at which a prompt of `length` tokens keeps its states, ascending.

    At its end, at message ends, at growing distances from its start (where a reader may leave) and from its end (where
    the next question about the same text parts from this one). The last token is always left to be read.
    """
    last = (length - 1) // page_size * page_size
    points = {last}
    kept = last
    for end in sorted({end // page_size * page_size for end in ends}, reverse=True):
        if kept - end >= MESSAGE_DISTANCE:
            points.add(end)
            kept = end
    if length > LONG_PROMPT:
        distance = page_size
        while distance <= length // GROWTH:
            points.add(last - distance)
            distance *= 2
        at = LONG_PROMPT
        while at < last:
            points.add(at // page_size * page_size)
            at += max(LONG_PROMPT, at // GROWTH)
    return sorted(point for point in points if 0 < point < length)
