"""Memory that grows with a sequence: what caches keep keys and values in."""

import torch
from torch import Tensor

from sala.model.rows import Rows


class GrowingTensor:
    """A tensor (B, S, ...) that grows along S without copying at every append.

    Memory is reserved ahead and reads zero until it is written: what lies past a row's end is masked, never skipped,
    and a stray NaN there would survive the mask.
    """

    def __init__(self, reserve: int = 0):
        self.buffer: Tensor | None = None
        self.length = 0
        self.reserve = reserve

    def extend_to(self, length: int, like: Tensor) -> Tensor:
        """Return the first `length` places (B, length, ...), of the dtype, device and other widths of `like`."""
        if self.buffer is None or self.capacity < length:
            self._move_to(max(length, self.reserve, 2 * self.length if self.buffer is not None else length), like)
        assert self.buffer is not None
        self.length = max(self.length, length)
        return self.buffer[:, :length]

    @property
    def capacity(self) -> int:
        """Places there are, written or not."""
        return 0 if self.buffer is None else self.buffer.shape[1]

    def hold(self, capacity: int) -> None:
        """Have memory for at least `capacity` places; where there is too little, all moves to memory for just as many."""
        if self.buffer is not None and self.capacity < capacity:
            self._move_to(capacity, self.buffer)

    def put(self, index_B: Tensor, new_B1: Tensor) -> None:
        """Write one new place a row, int64 (B,), that only the device knows; `length` is for the caller to say."""
        assert self.buffer is not None
        self.buffer[torch.arange(len(index_B), device=index_B.device), index_B] = new_B1[:, 0]

    def take(self, index_BN: Tensor) -> Tensor:
        """Return the places (B, N, ...) that int64 `index_BN` names, of each row its own."""
        assert self.buffer is not None
        return self.buffer[torch.arange(len(index_BN), device=index_BN.device)[:, None], index_BN]

    def first(self, places: int) -> Tensor:
        """Return the first `places`, written or not."""
        assert self.buffer is not None
        return self.buffer[:, :places]

    def _move_to(self, capacity: int, like: Tensor) -> None:
        grown = like.new_zeros((like.shape[0], capacity, *like.shape[2:]))
        if self.buffer is not None:
            grown[:, : self.length] = self.buffer[:, : self.length]
        self.buffer = grown

    @property
    def filled(self) -> Tensor | None:
        return None if self.buffer is None else self.buffer[:, : self.length]

    def select(self, rows: Tensor) -> None:
        if self.buffer is not None:
            self.buffer = self.buffer.index_select(0, rows.to(self.buffer.device))

    def write(self, new_BT: Tensor, rows: Rows, end: int) -> Tensor:
        """Write new tokens (B, T, ...) where `rows` says, and return the first `end` places."""
        everything = self.extend_to(end, new_BT)
        if rows.start is not None:
            everything[:, rows.start : rows.start + new_BT.shape[1]] = new_BT
        else:
            assert rows.ragged is not None
            row_N, column_N, position_N = rows.ragged.tokens
            everything[row_N, position_N] = new_BT[row_N, column_N]
        return everything

    def erase(self, rows: Rows) -> None:
        """Make places of padded rows that `write` has filled read zero again; those behind the longest row `cut` clears."""
        if self.buffer is not None and rows.ragged is not None:
            row_N, _, position_N = rows.ragged.tokens
            there_N = position_N < self.capacity
            self.buffer[row_N[there_N], position_N[there_N]] = 0

    def cut(self, length: int) -> None:
        """Forget everything from place `length` on; without places there is no batch either."""
        if self.buffer is not None:
            self.buffer[:, length : self.length] = 0
        self.length = length
        if length == 0:
            self.buffer = None

    @property
    def size_bytes(self) -> int:
        filled = self.filled
        return 0 if filled is None else filled.numel() * filled.element_size()
