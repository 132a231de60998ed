"""The shape of block-sparse attention: windows that score, blocks that are read, and who must be read anyway."""

from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import numpy as np

from sala.errors import ConfigError

# windows and steps of the coarse tier, in units of the fine one (MiniCPM-SALA, InfLLM-V2 stage 1)
COARSE_FACTOR = 4

NORMALIZERS = ("coarse", "exact")
DENSE_RULES = ("position", "sequence")


@dataclass(frozen=True, slots=True)
class Windows:
    """What a cache holds of a sequence's compressed keys, whatever a call then reads by them.

    tiers: (size, stride) in tokens of the fine windows and of the coarse ones.
    """

    tiers: tuple[tuple[int, int], tuple[int, int]]


class Numbers(NamedTuple):
    """A geometry as torch operators take it, a list of integers: `Numbers(*list)` names them again."""

    kernel_size: int
    kernel_stride: int
    coarse_size: int
    coarse_stride: int
    block_size: int
    init_blocks: int
    local_blocks: int
    num_selected: int
    exact: int


@dataclass(frozen=True, slots=True)
class SparseGeometry:
    """Geometry of InfLLM-V2 block selection; the defaults are those of the released MiniCPM-SALA.

    Window j is the mean of the keys of tokens [kernel_stride * j, kernel_stride * j + kernel_size); it is visible to a
    query once its last token is. A query at position p, in block p // block_size, reads `num_selected` blocks:
    the first `init_blocks`, its own block and the window_size // block_size before it, always; the rest by score.

    Attributes:
        kernel_size: tokens in a scoring window.
        kernel_stride: tokens from one window's start to the next; divides `block_size`.
        init_blocks: blocks at the start of the sequence that are always read.
        block_size: tokens in a block.
        window_size: tokens before the query's own block that are always read; a multiple of `block_size`.
        topk: blocks read besides the window, the initial ones and the query's own included.
        dense_len: a context of fewer tokens is read whole.
        normalizer: "coarse" weighs the heads of a group by a softmax over windows four times as large and as far apart
            (as released; where a query sees no such window yet, by the exact one), "exact" by the softmax itself.
        dense_rule: whose context `dense_len` is compared with: the query's own ("position": position + 1, so that one
            call, chunks and decoding agree) or the whole row's ("sequence": its last position + 1, as released).

    Raises:
        ConfigError: a field has the wrong type, or the fields do not fit together.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    dense_len: int = 8192
    normalizer: Literal["coarse", "exact"] = "coarse"
    dense_rule: Literal["position", "sequence"] = "position"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("normalizer", "dense_rule") and (
                not isinstance(value, int) or isinstance(value, bool)
            ):
                raise ConfigError(f"sparse attention: {field.name} must be an integer, not {value!r}")
        for name in ("kernel_size", "kernel_stride", "block_size", "topk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sparse attention: {name} must be at least 1, not {getattr(self, name)}")
        for name in ("init_blocks", "window_size", "dense_len"):
            if getattr(self, name) < 0:
                raise ConfigError(f"sparse attention: {name} must not be negative, not {getattr(self, name)}")
        if self.kernel_stride > self.kernel_size:
            raise ConfigError(
                f"sparse attention: kernel_stride {self.kernel_stride} exceeds kernel_size {self.kernel_size}: "
                "tokens between windows would never be scored"
            )
        if self.block_size % self.kernel_stride:
            raise ConfigError(
                f"sparse attention: block_size {self.block_size} must be a multiple of "
                f"kernel_stride {self.kernel_stride}"
            )
        if self.window_size % self.block_size:
            raise ConfigError(
                f"sparse attention: window_size {self.window_size} must be a multiple of block_size {self.block_size}"
            )
        if self.topk < self.init_blocks + 1:
            raise ConfigError(
                f"sparse attention: topk {self.topk} must be at least init_blocks + 1 = {self.init_blocks + 1}: "
                "the initial blocks and the query's own are always read"
            )
        if self.normalizer not in NORMALIZERS:
            raise ConfigError(f"sparse attention: normalizer must be one of {NORMALIZERS}, not {self.normalizer!r}")
        if self.dense_rule not in DENSE_RULES:
            raise ConfigError(f"sparse attention: dense_rule must be one of {DENSE_RULES}, not {self.dense_rule!r}")

    @property
    def windows(self) -> Windows:
        return Windows(((self.kernel_size, self.kernel_stride), (self.coarse_size, self.coarse_stride)))

    @property
    def numbers(self) -> list[int]:
        facts = {name: getattr(self, name) for name in Numbers._fields if name != "exact"}
        return list(Numbers(**facts, exact=int(self.normalizer == "exact")))

    @property
    def local_blocks(self) -> int:
        """Blocks before the query's own that are always read."""
        return self.window_size // self.block_size

    @property
    def num_selected(self) -> int:
        """Blocks a query reads; the released code adds the window on top of `topk`."""
        return self.topk + self.local_blocks

    @property
    def coarse_size(self) -> int:
        """Tokens in a window of the coarse tier."""
        return COARSE_FACTOR * self.kernel_size

    @property
    def coarse_stride(self) -> int:
        """Tokens from one coarse window's start to the next."""
        return COARSE_FACTOR * self.kernel_stride

    def first_sparse_position(self, last_position: int) -> int:
        """Return the lowest position whose query leaves something unread, in a row that ends at `last_position`.

        Below it attention is dense: by `dense_rule`, or because all blocks so far fit into `num_selected`.
        """
        all_fit = self.num_selected * self.block_size
        if self.dense_rule == "position":
            return max(self.dense_len - 1, all_fit)
        return all_fit if last_position + 1 >= self.dense_len else max(all_fit, last_position + 1)

    def of_row(self, num_tokens: int) -> "SparseGeometry":
        """Return the geometry that, by positions alone, reads what this one reads in a row of `num_tokens`.

        With it a part of the row can be attended without its end.
        """
        if self.dense_rule == "position":
            return self
        dense_len = 1 if num_tokens >= self.dense_len else num_tokens + 1
        return replace(self, dense_rule="position", dense_len=dense_len)

    def keys_read(self, num_tokens: int) -> int:
        """Return the sum over the positions of a row of `num_tokens` of the keys that a query head reads."""
        position = np.arange(num_tokens, dtype=np.int64)
        selected = (self.num_selected - 1) * self.block_size + position % self.block_size + 1
        dense = position < self.first_sparse_position(num_tokens - 1)
        return int(np.where(dense, position + 1, selected).sum())

    def windows_scored(self, num_tokens: int) -> int:
        """Return the sum over the sparse positions of a row of the windows, of both tiers, that a query head scores."""
        first = min(num_tokens, self.first_sparse_position(num_tokens - 1))
        position = np.arange(first, num_tokens, dtype=np.int64)
        tiers = [(self.kernel_size, self.kernel_stride)]
        if self.normalizer == "coarse":
            tiers.append((self.coarse_size, self.coarse_stride))
        return int(sum(np.maximum(0, (position + 1 - size) // stride + 1).sum() for size, stride in tiers))


def num_windows(num_tokens: int, size: int, stride: int) -> int:
    """Return how many windows of `size` tokens, `stride` apart, are complete after `num_tokens` tokens."""
    return max(0, (num_tokens - size) // stride + 1)
