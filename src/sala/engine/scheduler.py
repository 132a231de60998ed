"""Who runs in the next step: admission by memory, prompts in chunks between decoding steps, preemption, cancellation."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sala.engine.pages import Budget, Match, PrefixTree
from sala.engine.request import Finish, Request
from sala.errors import InputError, MemoryLimitError

# in company a step reads no more of a long prompt than takes about so long, and company lasts so long
SLICE_S, COMPANY_S = 0.05, 10.0
# a prompt that shares at least so many tokens with one that is being read waits for it
SHARED_TOKENS = 256


class QueueFullError(InputError):
    """More requests wait than the queue holds."""


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens that one request reads in a step."""

    request: Request
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What the engine does next, in this order.

    stopped: requests whose sequences are freed before the rest. started: requests that begin, from `states` or from
    nothing. rows: what is read in one pass.
    """

    stopped: tuple[Request, ...]
    started: tuple[Request, ...]
    rows: tuple[Row, ...]


class Scheduler:
    """Decides, knows no tensors.

    chunk: tokens of prompts read in one step. max_running: sequences at a time. max_waiting: length of the queue.
    """

    def __init__(
        self,
        budget: Budget,
        tree: PrefixTree,
        *,
        chunk: int,
        max_running: int = 64,
        max_waiting: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ):
        if min(chunk, max_running, max_waiting) < 1:
            raise InputError(
                f"chunk {chunk}, {max_running} running and {max_waiting} waiting requests; expected at least 1 of each"
            )
        self.budget, self.tree, self.clock = budget, tree, clock
        # chunks end where pages end
        self.chunk = max(budget.page_size, chunk // budget.page_size * budget.page_size)
        self.max_running, self.max_waiting = max_running, max_waiting
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self._oldest_turn = False
        # when a request last came while another one ran
        self._company_s = -math.inf

    def submit(self, request: Request) -> int:
        """Queue a request and return its place, 0 for the first.

        Raises:
            MemoryLimitError: it can never fit.
            QueueFullError: the queue is full.
        """
        tokens = len(request.prompt) + request.max_new_tokens
        if tokens > self.budget.longest:
            raise MemoryLimitError(
                f"{len(request.prompt):,} tokens of prompt and {request.max_new_tokens:,} of answer need "
                f"{self.budget.pages(tokens) * self.budget.page_bytes:,} bytes of cache; there are "
                f"{self.budget.total_bytes:,}, expected at most {self.budget.longest:,} tokens"
            )
        if len(self.waiting) >= self.max_waiting:
            raise QueueFullError(f"{len(self.waiting):,} requests are waiting; expected another try later")
        request.arrived_s = self.clock()
        if not self.is_idle:
            self._company_s = self.clock()
        self.waiting.append(request)
        return len(self.waiting) - 1

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def plan(self) -> Step:
        """Return the next step. Requests marked `cancelled` are stopped in it; the engine then releases their pages."""
        stopped = [request for request in self.running if request.cancelled]
        for request in stopped:
            self.end(request, "cancelled")
        for request in [request for request in self.waiting if request.cancelled]:
            self.waiting.remove(request)
            request.finish = "cancelled"
        stopped += self._grow()
        started = self._admit()
        return Step(tuple(stopped), tuple(started), tuple(self._rows()))

    def end(self, request: Request, finish: Finish) -> None:
        """Take a running request out; its pages are its own until `release`."""
        request.finish = finish
        self.running.remove(request)

    def release(self, request: Request) -> None:
        """Let others have the pages of a request that no longer runs."""
        self.budget.end(request.places)
        request.places = []

    def _grow(self) -> list[Request]:
        """Give every row pages for its next token; where there are none, the youngest requests wait again."""
        preempted: list[Request] = []
        for request in list(self.running):
            while request in self.running:
                more = self.budget.grow(max(0, self.budget.pages(request.length) - len(request.places)))
                if more is not None:
                    request.places += more
                    break
                youngest = self.running[-1]
                self._preempt(youngest)
                preempted.append(youngest)
        return preempted

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.release(request)
        request.read, request.mark = 0, None
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.insert(0, request)

    def _admit(self) -> list[Request]:
        started: list[Request] = []
        for request in list(self.waiting):
            if len(self.running) >= self.max_running:
                break
            pages = request.page_digests()
            match = Match(None, 0) if request.whole else self.tree.match(request.length, pages)
            if not request.whole and self._comes_with_another(request, pages, match.length):
                # others may pass
                continue
            if not self._start(request, pages, match):
                break
            started.append(request)
        return started

    def _start(self, request: Request, pages: Sequence[bytes], match: Match) -> bool:
        """Let a request run from what is kept of it; False where there is no room."""
        node = match.node
        shared = [] if node is None else node.all_places()
        states = None if node is None else node.states
        miss = "" if request.whole else self.tree.why_no_more(request.prompt, pages, match)
        places = self.budget.start(shared, self.budget.pages(request.length) - len(shared))
        if places is None:
            return False
        if node is not None:
            self.tree.touch(node)
        request.places, request.states, request.read = places, states, match.length
        if request.admitted_s is None:
            request.admitted_s = self.clock()
            request.cached, request.miss = match.length, miss
        if match.known > request.read:
            # where texts part, the next one can start
            request.add_stop(match.known)
        self.waiting.remove(request)
        self.running.append(request)
        return True

    def _comes_with_another(self, request: Request, pages: Sequence[bytes], found: int) -> bool:
        """Return whether a running request reads the same text, further than `found`, and will keep states there."""
        for other in self.running:
            if other.is_reading:
                shared = _num_common(pages, other.pages) * self.budget.page_size
                reached = max((stop for stop in other.stops if stop <= min(shared, request.length - 1)), default=0)
                if reached - found >= SHARED_TOKENS and other.read < reached:
                    return True
        return False

    def _rows(self) -> list[Row]:
        rows = [self._row(request, 1) for request in self.running if not request.is_reading]
        reading = [request for request in self.running if request.is_reading]
        if not reading:
            return rows
        left = self.chunk
        # the shortest first, so that a chat does not wait for a book; every other step the oldest takes half
        order = sorted(reading, key=lambda request: request.length - request.read)
        self._oldest_turn = not self._oldest_turn
        if self._oldest_turn and order[0] is not reading[0]:
            oldest = reading[0]
            order.remove(oldest)
            row = self._row(oldest, max(self.budget.page_size, left // 2))
            rows.append(row)
            left -= len(row.tokens)
        for request in order:
            if left < min(self.budget.page_size, request.next_stop() - request.read):
                break
            row = self._row(request, left)
            rows.append(row)
            left -= len(row.tokens)
        return rows

    def _row(self, request: Request, most: int) -> Row:
        if request.tokens_per_s is not None and self.clock() - self._company_s < COMPANY_S:
            most = min(most, max(self.budget.page_size, int(request.tokens_per_s * SLICE_S)))
        end = min(request.next_stop(), request.read + most)
        if end < request.next_stop():
            page = self.budget.page_size
            # a sequence may start off a page's end where an answer was interrupted
            end = max(request.read + 1, end // page * page)
        return Row(request, request.slice(request.read, end))


def _num_common(left: Sequence[bytes], right: Sequence[bytes]) -> int:
    """Return how many digests at the start are the same; each stands for all before it."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[middle - 1] == right[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
