"""Who holds memory: pages of running requests, and prefixes that were read before, kept for whoever continues them."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

# of evicted prefixes this many are remembered, to say so to whoever asks for one again
REMEMBERED = 4096


class Sized(Protocol):
    """Something of the runner's that takes memory."""

    @property
    def size_bytes(self) -> int: ...


class PagePool:
    """Numbers of pages, and who has them: running requests, kept prefixes, both, or nobody."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        # a page given back is the next one taken: memory that was never written stays untouched
        self._free = list(range(num_pages - 1, -1, -1))
        self._running, self._kept = [0] * num_pages, [0] * num_pages
        self.num_running = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def take(self, count: int) -> list[int]:
        """Return free pages for a running request; there are as many."""
        taken = [self._free.pop() for _ in range(count)]
        self._add(self._running, taken)
        return taken

    def run(self, pages: Iterable[int]) -> None:
        """Count another running request that has these pages."""
        self._add(self._running, pages)

    def stop(self, pages: Iterable[int]) -> None:
        self._remove(self._running, pages)

    def keep(self, pages: Iterable[int]) -> None:
        """Count another kept prefix that has these pages."""
        self._add(self._kept, pages)

    def drop(self, pages: Iterable[int]) -> None:
        self._remove(self._kept, pages)

    def _add(self, counts: list[int], pages: Iterable[int]) -> None:
        for page in pages:
            counts[page] += 1
            self.num_running += counts is self._running and counts[page] == 1

    def _remove(self, counts: list[int], pages: Iterable[int]) -> None:
        for page in pages:
            assert counts[page] > 0
            counts[page] -= 1
            self.num_running -= counts is self._running and counts[page] == 0
            if not self._running[page] and not self._kept[page]:
                self._free.append(page)


def digests(tokens: Sequence[int], page_size: int, before: Sequence[bytes] = ()) -> list[bytes]:
    """Return a digest for each full page, of it and all pages before it; `before` are those of earlier pages."""
    result = list(before)
    last = result[-1] if result else b""
    for start in range(0, len(tokens) - page_size + 1, page_size):
        last = hashlib.blake2b(last + array("q", tokens[start : start + page_size]).tobytes(), digest_size=16).digest()
        result.append(last)
    return result


@dataclass(eq=False)
class Node:
    """A prefix of `length` tokens, whose last page has the digest.

    tokens, pages, places: those after the parent, the digests of its pages and their numbers. states: of the layers that
    have one, at the end of the prefix; None once they are evicted, while `children` still need the pages.
    """

    digest: bytes
    length: int
    parent: "Node | None"
    tokens: tuple[int, ...]
    pages: tuple[bytes, ...]
    places: tuple[int, ...]
    states: Sized | None
    children: int = 0

    @property
    def start(self) -> int:
        return self.length - len(self.tokens)

    def path(self) -> "list[Node]":
        """Return the nodes from the start of the text to this one: together their pages are those of the prefix."""
        before = [] if self.parent is None else self.parent.path()
        return [*before, self]

    def all_places(self) -> list[int]:
        return [place for node in self.path() for place in node.places]


@dataclass(frozen=True, slots=True)
class Match:
    """The longest kept prefix, None for none, and how many tokens of the text are in any node."""

    node: Node | None
    known: int

    @property
    def length(self) -> int:
        return 0 if self.node is None else self.node.length


class PrefixTree:
    """Prefixes by the digest of their last page; the states used longest ago go first.

    A node exists only once all layers have written its pages and states.
    """

    def __init__(self, page_size: int, pool: PagePool):
        self.page_size, self.pool = page_size, pool
        self.state_bytes = 0
        self.evictions = 0
        self._nodes: dict[bytes, Node] = {}
        # a node whose own pages include a digest
        self._edges: dict[bytes, Node] = {}
        # those with states, the least recently used first
        self._kept: OrderedDict[bytes, Node] = OrderedDict()
        self._evicted: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def match(self, length: int, pages: Sequence[bytes]) -> Match:
        """Return the longest kept prefix of a text of `length` tokens, at least one token shorter than it."""
        usable = min(len(pages), (length - 1) // self.page_size)
        best = next((i for i in range(usable, 0, -1) if pages[i - 1] in self._kept), 0)
        known = next((i for i in range(len(pages), best, -1) if pages[i - 1] in self._edges), best)
        return Match(self._kept[pages[best - 1]] if best else None, known * self.page_size)

    def why_no_more(self, tokens: Sequence[int], pages: Sequence[bytes], match: Match) -> str:
        """Return why no longer prefix of `tokens` was found, "" where all full pages were."""
        usable = (len(tokens) - 1) // self.page_size
        found = match.length // self.page_size
        if found == usable:
            return ""
        if any(page in self._evicted for page in pages[found:usable]):
            return "evicted"
        if not self._nodes:
            return "nothing is kept"
        parted = self._parting(tokens, pages, match.known // self.page_size)
        if match.length == parted // self.page_size * self.page_size:
            return f"other text from token {parted:,}"
        return f"other text from token {parted:,}, and states before it only at token {match.length:,}"

    def touch(self, node: Node) -> None:
        """Take note that a prefix was used."""
        if node.digest in self._kept:
            self._kept.move_to_end(node.digest)

    def deepest(self, pages: Sequence[bytes]) -> Node | None:
        """Return the longest node on the way, with or without states: where the pages of a new node begin."""
        return next((self._nodes[page] for page in reversed(pages) if page in self._nodes), None)

    def find(self, digest: bytes) -> Node | None:
        """Return the node whose last page has the digest, with or without states."""
        return self._nodes.get(digest)

    def add(self, tokens: tuple[int, ...], pages: Sequence[bytes], places: Sequence[int], states: Sized) -> Node:
        """Keep a prefix of `pages`; tokens and places: those after the `deepest` node on its way."""
        parent = self.deepest(pages)
        own = tuple(pages[0 if parent is None else parent.length // self.page_size :])
        assert own and len(own) * self.page_size == len(tokens) and len(own) == len(places)
        node = Node(pages[-1], len(pages) * self.page_size, parent, tokens, own, tuple(places), states)
        if parent is not None:
            parent.children += 1
        self._nodes[node.digest] = self._kept[node.digest] = node
        self._edges.update(dict.fromkeys(own, node))
        self._evicted.pop(node.digest, None)
        self.pool.keep(node.places)
        self.state_bytes += states.size_bytes
        return node

    def renew(self, node: Node, states: Sized) -> None:
        """Give a node its states back, which were evicted; one that has them is touched."""
        if node.states is None:
            node.states = states
            self.state_bytes += states.size_bytes
            self._kept[node.digest] = node
            self._evicted.pop(node.digest, None)
        self.touch(node)

    def evict(self) -> bool:
        """Forget the states used longest ago, and pages that then nobody needs; False where there are none."""
        if not self._kept:
            return False
        _, node = self._kept.popitem(last=False)
        assert node.states is not None
        self.state_bytes -= node.states.size_bytes
        node.states = None
        self.evictions += 1
        self._evicted[node.digest] = None
        if len(self._evicted) > REMEMBERED:
            self._evicted.popitem(last=False)
        self._prune(node)
        return True

    def _prune(self, node: Node | None) -> None:
        """Remove nodes without states and children, from `node` towards the start."""
        while node is not None and node.states is None and not node.children:
            self.pool.drop(node.places)
            del self._nodes[node.digest]
            for page in node.pages:
                if self._edges.get(page) is node:
                    del self._edges[page]
            node = node.parent
            if node is not None:
                node.children -= 1

    def _parting(self, tokens: Sequence[int], pages: Sequence[bytes], known: int) -> int:
        """Return the first token that differs from all kept text that has the first `known` pages in common."""
        start = known * self.page_size
        mine = tuple(tokens[start : start + self.page_size])
        before = set(pages[known - 1 : known])
        longest = 0
        for node in self._nodes.values():
            leads = node.start == 0 if not known else not before.isdisjoint(node.pages)
            follows = known and node.parent is not None and node.parent.digest in before
            if leads or follows:
                other = node.tokens[start - node.start : start - node.start + self.page_size]
                pairs = zip(mine, other, strict=False)
                same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other)))
                longest = max(longest, same)
        return start + longest


class Budget:
    """Bytes for running requests and kept prefixes together; a running request comes first.

    total_bytes: all there is. page_bytes: a page of all layers. state_bytes: of a running sequence.
    """

    def __init__(self, total_bytes: int, page_bytes: int, state_bytes: int, tree: PrefixTree):
        self.total_bytes, self.page_bytes, self.state_bytes = total_bytes, page_bytes, state_bytes
        self.tree, self.pool, self.page_size = tree, tree.pool, tree.page_size
        self.num_running = 0

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def longest(self) -> int:
        """The most tokens that one sequence can have when nothing else runs."""
        pages = min(self.pool.num_pages, (self.total_bytes - self.state_bytes) // self.page_bytes)
        return max(0, pages * self.page_size)

    @property
    def running_bytes(self) -> int:
        return self.pool.num_running * self.page_bytes + self.num_running * self.state_bytes

    @property
    def used_bytes(self) -> int:
        states = self.num_running * self.state_bytes + self.tree.state_bytes
        return self.pool.num_used * self.page_bytes + states

    def make_room(self, pages: int, size_bytes: int) -> bool:
        """Evict prefixes until there are free pages, and bytes for them and `size_bytes` more.

        False, with nothing evicted, where running requests hold too much.
        """
        size_bytes += pages * self.page_bytes
        if self.pool.num_pages - self.pool.num_running < pages or self.total_bytes - self.running_bytes < size_bytes:
            return False
        while self.pool.num_free < pages or self.total_bytes - self.used_bytes < size_bytes:
            evicted = self.tree.evict()
            assert evicted
        return True

    def start(self, shared: Sequence[int], pages: int) -> list[int] | None:
        """Return the pages of a request that begins: those that it shares and `pages` new ones; None without room."""
        # what is shared is not evicted then
        self.pool.run(shared)
        if not self.make_room(pages, self.state_bytes):
            self.pool.stop(shared)
            return None
        self.num_running += 1
        return [*shared, *self.pool.take(pages)]

    def grow(self, pages: int) -> list[int] | None:
        """Return new pages for a request that runs, None without room."""
        return self.pool.take(pages) if self.make_room(pages, 0) else None

    def end(self, pages: Sequence[int]) -> None:
        """Take note that a request no longer runs."""
        self.num_running -= 1
        self.pool.stop(pages)
