"""Who holds memory: pages of running requests, and prefixes that were read before, kept for whoever continues them."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# of evicted prefixes this many are remembered, to say so to whoever asks for one again
REMEMBERED = 4096


class Sized(Protocol):
    """Something of the runner's that takes memory."""

    @property
    def size_bytes(self) -> int: ...


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

    tokens, pages, keys: those after the parent. states: of the layers that have one, at the end of the prefix; None once
    they are evicted, while `children` still need the keys.
    """

    digest: bytes
    length: int
    parent: "Node | None"
    tokens: tuple[int, ...]
    pages: tuple[bytes, ...]
    keys: Sized
    states: Sized | None
    children: int = 0

    @property
    def size_bytes(self) -> int:
        return self.keys.size_bytes + (0 if self.states is None else self.states.size_bytes)

    @property
    def start(self) -> int:
        return self.length - len(self.tokens)

    def path(self) -> "list[Node]":
        """Return the nodes from the start of the text to this one: together their keys are those of the prefix."""
        before = [] if self.parent is None else self.parent.path()
        return [*before, self]


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

    A node exists only once all layers have written its keys and states.
    """

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.size_bytes = 0
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
        """Return the longest node on the way, with or without states: where the keys of a new node begin."""
        return next((self._nodes[page] for page in reversed(pages) if page in self._nodes), None)

    def find(self, digest: bytes) -> Node | None:
        """Return the node whose last page has the digest, with or without states."""
        return self._nodes.get(digest)

    def add(self, tokens: tuple[int, ...], pages: Sequence[bytes], keys: Sized, states: Sized) -> Node:
        """Keep a prefix of `pages`; tokens and keys: those after the `deepest` node on its way."""
        parent = self.deepest(pages)
        own = tuple(pages[0 if parent is None else parent.length // self.page_size :])
        assert own and len(own) * self.page_size == len(tokens)
        node = Node(pages[-1], len(pages) * self.page_size, parent, tokens, own, keys, states)
        if parent is not None:
            parent.children += 1
        self._nodes[node.digest] = self._kept[node.digest] = node
        self._edges.update(dict.fromkeys(own, node))
        self._evicted.pop(node.digest, None)
        self.size_bytes += node.size_bytes
        return node

    def renew(self, node: Node, states: Sized) -> None:
        """Give a node its states back, which were evicted; one that has them is touched."""
        if node.states is None:
            node.states = states
            self.size_bytes += states.size_bytes
            self._kept[node.digest] = node
            self._evicted.pop(node.digest, None)
        self.touch(node)

    def evict(self) -> bool:
        """Forget the states used longest ago, and keys that then nobody needs; False where there are none."""
        if not self._kept:
            return False
        _, node = self._kept.popitem(last=False)
        assert node.states is not None
        self.size_bytes -= node.states.size_bytes
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
            self.size_bytes -= node.keys.size_bytes
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

    total_bytes: all there is. token_bytes: keys and values of one token. state_bytes: what a sequence takes at any length.
    """

    def __init__(self, total_bytes: int, page_size: int, token_bytes: int, state_bytes: int, tree: PrefixTree):
        self.total_bytes, self.page_size = total_bytes, page_size
        self.token_bytes, self.state_bytes = token_bytes, state_bytes
        self.tree = tree
        self.live_bytes = 0

    def need(self, tokens: int) -> int:
        """Return the bytes of a sequence of `tokens`, in whole pages."""
        pages = -(-tokens // self.page_size)
        return pages * self.page_size * self.token_bytes + self.state_bytes

    @property
    def longest(self) -> int:
        """The most tokens that one sequence can have when nothing else runs."""
        pages = (self.total_bytes - self.state_bytes) // max(1, self.page_size * self.token_bytes)
        return max(0, pages * self.page_size)

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.live_bytes - self.tree.size_bytes

    def could_take(self, size_bytes: int) -> bool:
        """Return whether so many bytes would be free if nothing was kept for later."""
        return self.total_bytes - self.live_bytes >= size_bytes

    def make_room(self, size_bytes: int) -> bool:
        """Evict prefixes until so many bytes are free; False, with nothing evicted, where running requests hold them."""
        if not self.could_take(size_bytes):
            return False
        while self.free_bytes < size_bytes:
            evicted = self.tree.evict()
            assert evicted
        return True

    def take(self, size_bytes: int) -> bool:
        """Set bytes aside for a running request; False where there are not enough."""
        if not self.make_room(size_bytes):
            return False
        self.live_bytes += size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        self.live_bytes -= size_bytes
        assert self.live_bytes >= 0
