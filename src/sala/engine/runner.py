"""Sequences on a model: rows of any lengths read new tokens together, in pages and slots that the scheduler hands out."""

import math
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sala.engine.watch import Watch
from sala.errors import InputError
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, PagedRow, new_paged_cache
from sala.model.kinds import runs
from sala.model.report import cache_bytes, cache_bytes_per_token

# pages have at least so many tokens: short, so that short prompts share them; from 256 on results would be those of one piece bit for bit
MIN_PAGE_TOKENS = 64
# a sequence has two slots: what it reads from, and what it writes to
SLOTS = 2


@dataclass(eq=False)
class Sequence:
    """What a model remembers of one text: its pages, in order, as the scheduler keeps them, and the slots of its states."""

    pages: list[int]
    slots: tuple[int, int]
    length: int = 0
    has_state: bool = False


@dataclass(frozen=True, slots=True)
class Extension:
    """Tokens that a sequence reads; it has pages for them.

    every: logits of all of them are wanted, not of the last alone. watched: also which blocks its sparse layers read.
    """

    sequence: Sequence
    tokens: Many[int]
    every: bool = False
    watched: bool = False


@dataclass(frozen=True, slots=True)
class Extended:
    """Logits (N, X) float32 of the last token or of every one, and what came beside.

    seconds: how long the pass took that the row was in. blocks: attention to each, (blocks,) float32.
    """

    logits_NX: Tensor
    seconds: float
    blocks_N: Tensor | None = None


@dataclass(frozen=True, slots=True)
class States:
    """The states (H, K, V) of lightning layers after `length` tokens, by layer; None for another layer."""

    length: int
    tensors: tuple[Tensor | None, ...]

    @property
    def size_bytes(self) -> int:
        return sum(state.numel() * state.element_size() for state in self.tensors if state is not None)


def page_tokens(config: MiniCPMSALAConfig) -> int:
    """Return the tokens of a page: whole blocks and whole windows of a sparse layer."""
    if not runs(config.mixer_types, "infllm"):
        return MIN_PAGE_TOKENS
    geometry = config.sparse_geometry
    return math.lcm(MIN_PAGE_TOKENS, geometry.block_size, geometry.coarse_stride)


class Runner:
    """Runs sequences on a model.

    budget_bytes: for pages, and for states of running sequences and of kept prefixes, together. max_running: sequences at
    a time. Memory of a CPU is taken when it is written first; on another device all pages are there from the start.
    """

    def __init__(self, model: MiniCPMSALAForCausalLM, budget_bytes: int, max_running: int = 64):
        self.model, self.config = model, model.config
        self.budget_bytes, self.max_running = budget_bytes, max_running
        self.page_size = page_tokens(model.config)
        itemsize = model.dtype.itemsize
        self.page_bytes = math.ceil(cache_bytes_per_token(model.config, itemsize) * self.page_size)
        self.state_bytes = cache_bytes(model.config, 0, itemsize)
        slots = SLOTS * max_running
        room = budget_bytes if model.device.type == "cpu" else budget_bytes - slots * self.state_bytes
        self.num_pages = room // self.page_bytes
        if self.num_pages < 1:
            raise InputError(f"{budget_bytes:,} bytes of cache for {max_running} sequences; expected room for a page")
        self.cache = new_paged_cache(model.config, self.num_pages, slots, self.page_size)
        self._slots = list(range(slots))

    def open(self, pages: list[int]) -> Sequence:
        """Return an empty sequence on pages that grow with it."""
        return Sequence(pages, (self._slots.pop(), self._slots.pop()))

    @torch.inference_mode()
    def restore(self, pages: list[int], states: States) -> Sequence:
        """Return a sequence that has read what its first pages hold, and whose states are these."""
        sequence = self.open(pages)
        self.cache.fill_slot(sequence.slots[0], states.tensors)
        sequence.length, sequence.has_state = states.length, True
        return sequence

    def free(self, sequence: Sequence) -> None:
        """Forget a sequence; whose its pages are is not said here."""
        self._slots += sequence.slots

    def states(self, sequence: Sequence) -> States:
        """Return a copy of the states as they are now."""
        states = self.cache.slot(sequence.slots[0])
        return States(sequence.length, tuple(None if state is None else state.clone() for state in states))

    @torch.inference_mode()
    def extend(self, rows: Many[Extension]) -> list[Extended]:
        """Read new tokens, of any number in each row.

        Rows of one token are read together; longer ones, and those that are watched, one after the other: padding them
        to one length would cost more than it saves.
        """
        alone = [index for index, row in enumerate(rows) if len(row.tokens) > 1 or row.watched]
        together = [index for index in range(len(rows)) if index not in set(alone)]
        results: dict[int, Extended] = {}
        for group in [together, *([index] for index in alone)]:
            if group:
                results |= zip(group, self._extend([rows[index] for index in group]), strict=True)
        return [results[index] for index in range(len(rows))]

    def _extend(self, rows: Many[Extension]) -> list[Extended]:
        started = time.perf_counter()
        ids_BT = torch.tensor([list(row.tokens) for row in rows], device=self.model.device)
        places = [_row(row.sequence) for row in rows]
        network, watch = self.model.model, Watch(self.model) if rows[0].watched else None
        placed = network.rotated(self.cache.place(places, [len(row.tokens) for row in rows], self.model.device))
        if watch is None:
            hidden_BTD = network.run(ids_BT, placed, self.cache.layers)
        else:
            with watch:
                hidden_BTD = network.run(ids_BT, placed, self.cache.layers)
        every = rows[0].every and len(rows) == 1
        logits_BTX = self.model.logits(hidden_BTD if every else hidden_BTD[:, -1:])
        for row in rows:
            sequence = row.sequence
            # only now is the call known to have succeeded
            sequence.slots, sequence.has_state = sequence.slots[::-1], True
            sequence.length += len(row.tokens)
        blocks_N = None if watch is None else watch.blocks_N()
        seconds = time.perf_counter() - started
        return [Extended(logits_TX, seconds, blocks_N) for logits_TX in logits_BTX]


def _row(sequence: Sequence) -> PagedRow:
    read, written = sequence.slots
    return PagedRow(np.array(sequence.pages, np.int32), sequence.length, (read if sequence.has_state else -1, written))
