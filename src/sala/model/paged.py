"""Memory of many requests at once: pages for keys, values and windows, slots for states; who owns which is said from outside.

A row of a call names its pages and its slot. Rows of any lengths run together, a full page may belong to many rows, and a
state is saved by keeping or copying its slot.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sala.errors import InputError
from sala.model.cache import MixerCache
from sala.model.config import MiniCPMSALAConfig
from sala.model.rows import Pages, Rows
from sala.ops.infllm import SparseGeometry, compress, num_windows

# tokens in a page: of this number, or a multiple, results are those of rows in one piece bit for bit
PAGE_TOKENS = 256


@dataclass(frozen=True, slots=True)
class PagedRow:
    """One row of a call.

    pages: int32, numbers of the pages of its tokens in order, with room for the new ones.
    length: tokens that it has read.
    slots: where its state is read, -1 before the first token, and where the next one is written: another slot, so that a
        call that fails changes nothing.
    """

    pages: np.ndarray
    length: int
    slots: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many pages and slots there are, and tokens in a page."""

    pages: int
    slots: int
    page_tokens: int = PAGE_TOKENS


class PagedTensor:
    """One tensor a token, or a window, in pages (N, places, ...); memory is taken at the first writing, and reads zero."""

    def __init__(self, pages: int, places: int):
        self.pages, self.places = pages, places
        self.buffer: Tensor | None = None

    def like(self, new_NGK: Tensor) -> Tensor:
        """Return the pages, of the dtype, device and widths of `new_NGK`."""
        if self.buffer is None:
            self.buffer = _zeros((self.pages, self.places, *new_NGK.shape[1:]), new_NGK.dtype, new_NGK.device)
        return self.buffer

    def write(self, places_N: Tensor, new_NGK: Tensor) -> Tensor:
        """Write at places counted through all pages, and return the pages."""
        buffer = self.like(new_NGK)
        if len(places_N):
            buffer.flatten(0, 1).index_copy_(0, places_N, new_NGK)
        return buffer


class AttentionPool:
    """Keys and values in pages."""

    # what fails leaves nothing that a later call reads
    open = True

    def __init__(self, config: MiniCPMSALAConfig, sizes: Sizes):
        self.keys, self.values = (PagedTensor(sizes.pages, sizes.page_tokens) for _ in range(2))

    def paged(self) -> list[PagedTensor]:
        return [self.keys, self.values]

    def append(self, k_BTGK: Tensor, v_BTGV: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Write the new keys and values and return the pages of all, (N, P, G, K) and (N, P, G, V)."""
        assert rows.pages is not None
        k_NGK, v_NGV = (x if rows.mask_BT is None else x[rows.mask_BT] for x in (k_BTGK, v_BTGV))
        if rows.mask_BT is None:
            k_NGK, v_NGV = k_NGK.flatten(0, 1), v_NGV.flatten(0, 1)
        return self.keys.write(rows.pages.places_N, k_NGK), self.values.write(rows.pages.places_N, v_NGV)


class SparsePool(AttentionPool):
    """Keys, values and two tiers of compressed keys in pages, a window in that of its last token."""

    def __init__(self, config: MiniCPMSALAConfig, sizes: Sizes):
        super().__init__(config, sizes)
        self.windows = config.sparse_geometry.windows
        check_page(sizes.page_tokens, config.sparse_geometry)
        self.tiers = [PagedTensor(sizes.pages, sizes.page_tokens // stride) for _, stride in self.windows.tiers]

    def paged(self) -> list[PagedTensor]:
        return [*super().paged(), *self.tiers]

    def compressed(self, k_NCGK: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Compute the windows that have completed and return the pages of both tiers, (N, P / stride, G, K)."""
        assert rows.pages is not None
        for tier, (places_N, tokens_NC) in zip(self.tiers, rows.pages.windows, strict=True):
            buffer, size = tier.like(k_NCGK[0]), tokens_NC.shape[1]
            if len(places_N):
                keys_1SGK = k_NCGK.flatten(0, 1).index_select(0, tokens_NC.flatten())[None]
                buffer.flatten(0, 1).index_copy_(0, places_N, compress(keys_1SGK, size, size)[0])
        fine, coarse = (tier.buffer for tier in self.tiers)
        assert fine is not None and coarse is not None
        return fine, coarse


class StatePool:
    """Float32 states in slots (N, H, K, V)."""

    open = True

    def __init__(self, config: MiniCPMSALAConfig, sizes: Sizes):
        assert config.lightning_nh is not None and config.lightning_head_dim is not None
        width = config.lightning_head_dim
        self.shape = (sizes.slots, config.lightning_nh, width, config.v_head_dim or width)
        self.buffer: Tensor | None = None

    def like(self, new: Tensor) -> Tensor:
        """Return the slots, on the device of `new`."""
        if self.buffer is None:
            self.buffer = _zeros(self.shape, torch.float32, new.device)
        return self.buffer

    def initial(self, rows: Rows, like: Tensor) -> Tensor:
        """Return the pool, which `lightning_attention` changes."""
        return self.like(like)

    def keep(self, state_NHKV: Tensor, rows: Rows) -> None:
        assert state_NHKV is self.buffer


class PagedCache:
    """The pools of all layers. Pages and slots are numbers here: who may use which is for the caller to say.

    `sala.model.new_paged_cache` makes one.
    """

    def __init__(self, layers: Sequence[MixerCache], sizes: Sizes):
        self.layers, self.sizes = list(layers), sizes
        self.tiers = next((layer.windows.tiers for layer in self.layers if isinstance(layer, SparsePool)), ())

    def place(self, rows: Sequence[PagedRow], new_tokens: Sequence[int], device: torch.device | str = "cpu") -> Rows:
        """Return where `new_tokens` tokens of each row stand; shorter rows are padded on the right.

        Raises:
            InputError: a row without room for its tokens, a page or a slot that there is not, or one slot for two.
        """
        self._check(rows, new_tokens)
        size = self.sizes.page_tokens
        ends = [row.length + new for row, new in zip(rows, new_tokens, strict=True)]
        longest = max(new_tokens)
        column_T = np.arange(longest)
        length_B1 = np.array([row.length for row in rows])[:, None]
        real_BT = column_T < np.array(new_tokens)[:, None]
        padded = not real_BT.all()
        table_BP = np.zeros((len(rows), max(-(-end // size) for end in ends)), np.int32)
        for entry, row, end in zip(table_BP, rows, ends, strict=True):
            entry[: -(-end // size)] = row.pages[: -(-end // size)]
        places = [_places(row.pages, np.arange(row.length, end), size) for row, end in zip(rows, ends, strict=True)]
        slots_2B = np.array([row.slots for row in rows], np.int64).T
        windows = tuple(self._windows(rows, ends, *tier) for tier in self.tiers)
        send = _sender(device)
        return Rows(
            send(np.where(real_BT, length_B1 + column_T, -1)),
            Pages(
                send(table_BP),
                send(np.concatenate(places)),
                send(slots_2B),
                tuple((send(places_N), send(tokens_NC)) for places_N, tokens_NC in windows),
                start=rows[0].length if len(rows) == 1 else None,
            ),
            mask_BT=send(real_BT) if padded else None,
        )

    def _windows(
        self, rows: Sequence[PagedRow], ends: Sequence[int], size: int, stride: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the places (N,) of windows that these tokens complete, and those of their keys (N, size)."""
        page_tokens = self.sizes.page_tokens
        places, tokens = [np.zeros(0, np.int64)], [np.zeros((0, size), np.int64)]
        for row, end in zip(rows, ends, strict=True):
            window_N = np.arange(num_windows(row.length, size, stride), num_windows(end, size, stride))
            if len(window_N):
                places.append(_places(row.pages, window_N + (size - 1) // stride, page_tokens // stride))
                tokens.append(_places(row.pages, window_N[:, None] * stride + np.arange(size), page_tokens))
        return np.concatenate(places), np.concatenate(tokens)

    def _check(self, rows: Sequence[PagedRow], new_tokens: Sequence[int]) -> None:
        if not rows or min(new_tokens) < 1:
            raise InputError(f"rows read {list(new_tokens)} new tokens; expected at least one row, and a token in each")
        for index, (row, new) in enumerate(zip(rows, new_tokens, strict=True)):
            needed = -(-(row.length + new) // self.sizes.page_tokens)
            if len(row.pages) < needed:
                raise InputError(
                    f"row {index} has {len(row.pages)} pages for {row.length + new} tokens; expected {needed} of "
                    f"{self.sizes.page_tokens} tokens"
                )
            used = row.pages[:needed]
            if used.min() < 0 or used.max() >= self.sizes.pages:
                raise InputError(f"row {index} has pages {used.tolist()}; expected numbers below {self.sizes.pages}")
        written = [row.slots[1] for row in rows]
        read = [row.slots[0] for row in rows if row.slots[0] >= 0]
        known = all(0 <= slot < self.sizes.slots for slot in [*written, *read])
        if not known or len(set(written)) < len(rows) or set(written) & set(read):
            raise InputError(
                f"rows read slots {[row.slots[0] for row in rows]} and write {written}; expected numbers below "
                f"{self.sizes.slots}, each written once and none of them read"
            )

    def tensors(self) -> Iterator[tuple[int, PagedTensor]]:
        """Yield the layer's number and every tensor in pages, in an order that stays."""
        for index, layer in enumerate(self.layers):
            for tensor in layer.paged() if isinstance(layer, AttentionPool) else ():
                yield index, tensor

    @torch.no_grad()
    def fill_slot(self, slot: int, states: Sequence[Tensor | None]) -> None:
        """Write states (H, K, V), by layer as `slot` returns them, into a slot."""
        for layer, state in zip(self.layers, states, strict=True):
            if isinstance(layer, StatePool) and state is not None:
                layer.like(state)[slot] = state

    def slot(self, slot: int) -> list[Tensor | None]:
        """Return the states in a slot, by layer, as views; None for a layer that has none."""
        states = [layer.buffer if isinstance(layer, StatePool) else None for layer in self.layers]
        return [None if state is None else state[slot] for state in states]

    @property
    def size_bytes(self) -> int:
        """Bytes of all pools, used or not."""
        buffers = [tensor.buffer for _, tensor in self.tensors()]
        buffers += [layer.buffer for layer in self.layers if isinstance(layer, StatePool)]
        return sum(x.numel() * x.element_size() for x in buffers if x is not None)


def check_page(page_tokens: int, geometry: SparseGeometry) -> None:
    """Check that a page holds whole blocks and a whole number of windows.

    Raises:
        InputError: it does not.
    """
    for unit in (geometry.block_size, geometry.coarse_stride):
        if page_tokens % unit:
            raise InputError(f"pages of {page_tokens} tokens; expected a multiple of {unit}")


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    # what is made in inference mode could be written there only
    with torch.inference_mode(False):
        if device.type != "cpu":
            return torch.zeros(*shape, dtype=dtype, device=device)
        # torch writes zeros; the system has them, and gives memory when it is first written
        zeros = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
        return torch.from_numpy(zeros).view(dtype).view(*shape)


def _places(pages: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    """Return the places, counted through all pages, of a row's places `index`, `size` in a page."""
    return pages.astype(np.int64)[index // size] * size + index % size


def _sender(device: torch.device | str):
    def send(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.to(device, non_blocking=True)

    return send
