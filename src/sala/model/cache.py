"""What each kind of layer remembers between calls, as one `transformers` cache."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sala.errors import InputError
from sala.model.config import MiniCPMSALAConfig
from sala.model.growing import GrowingTensor
from sala.model.rows import Recorded, Rows
from sala.model.seen import SeenTokens
from sala.ops.infllm import compress, num_windows


class MixerCache(Protocol):
    """What every layer has that remembers.

    open: whether a call is reading: outside of one nobody has a reason to write.
    """

    open: bool


class KeysAndValues(Protocol):
    """What full attention asks of a cache."""

    def append(self, k_BTGK: Tensor, v_BTGV: Tensor, rows: Rows) -> tuple[Tensor, Tensor]: ...


@runtime_checkable
class CompressedKeys(KeysAndValues, Protocol):
    """What block-sparse attention asks of a cache."""

    def compressed(self, k_BSGK: Tensor, rows: Rows) -> tuple[Tensor, Tensor]: ...


class States(Protocol):
    """What lightning attention asks of a cache."""

    def initial(self, rows: Rows, like: Tensor) -> Tensor | None: ...

    def keep(self, state_BHKV: Tensor, rows: Rows) -> None: ...


class LayerCache(CacheLayerMixin):
    """The part of transformers' layer interface that is the same for every mixer of ours."""

    is_croppable = False

    @classmethod
    def bytes_after(cls, config: MiniCPMSALAConfig, length: int, itemsize: int) -> int:
        """Return the bytes of one sequence's cache in one layer after `length` tokens."""
        raise NotImplementedError

    # whether a call is reading: outside of one nobody has a reason to write
    open = False

    def tensors(self) -> list[GrowingTensor]:
        raise NotImplementedError

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows` (int64), in that order."""
        for tensor in self.tensors():
            tensor.select(rows)

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors())

    def rows_held(self) -> int:
        held = [tensor.buffer.shape[0] for tensor in self.tensors() if tensor.buffer is not None]
        return held[0] if held else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(torch.arange(self.rows_held()).repeat_interleave(repeats))

    def reset(self) -> None:
        for tensor in self.tensors():
            tensor.buffer, tensor.length = None, 0

    def hold(self, tokens: int) -> None:
        """Have memory for a sequence of that many tokens, which stays where it is as long as no more are read."""

    def count(self, tokens: int) -> None:
        """Take note that steps whose positions only the device knew have made the sequence so many tokens long."""

    def mark(self, *, copied: bool = True) -> Any:
        """Return what `rewind` needs to come back to this moment.

        copied: False where states are replaced from here on, not changed in place: nothing is copied then.
        """
        return [tensor.length for tensor in self.tensors()]

    def erase(self, rows: Rows) -> None:
        """Clear what an interrupted call has written below the lengths that a mark holds."""

    def rewind(self, mark: Any) -> None:
        for tensor, length in zip(self.tensors(), mark, strict=True):
            tensor.cut(length)

    def crop(self, tokens_to_remove: int) -> None:
        raise InputError("this cache holds recurrent states, which cannot be cut back; keep a copy from before instead")

    # The rest is transformers' own path to a layer, which our mixers do not take.
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the mixer writes this layer")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the mixer writes this layer")

    def get_seq_length(self) -> int:
        return max((tensor.length for tensor in self.tensors()), default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # its name before transformers 5.20
        return -1


class AttentionCache(LayerCache):
    """Keys and values: the one of position p stands at index p of its row, so padding takes no place."""

    def __init__(self, config: MiniCPMSALAConfig, reserve: int = 0):
        super().__init__()
        self.key_places = GrowingTensor(reserve)
        self.value_places = GrowingTensor(reserve)

    @classmethod
    def bytes_after(cls, config: MiniCPMSALAConfig, length: int, itemsize: int) -> int:
        assert config.num_key_value_heads is not None and config.head_dim is not None
        return 2 * length * config.num_key_value_heads * config.head_dim * itemsize

    def tensors(self) -> list[GrowingTensor]:
        return [self.key_places, self.value_places]

    def append(self, k_BTGK: Tensor, v_BTGV: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Write the new keys and values and return all of them, (B, S, G, K) and (B, S, G, V)."""
        if rows.recorded is not None:
            self.key_places.put(rows.positions_BT[:, 0], k_BTGK)
            self.value_places.put(rows.positions_BT[:, 0], v_BTGV)
            return self.key_places.first(rows.recorded.capacity), self.value_places.first(rows.recorded.capacity)
        if rows.ragged is not None:
            end = max(rows.ragged.ends)
        else:
            assert rows.start is not None
            end = rows.start + k_BTGK.shape[1]
        end = max(end, self.key_places.length)
        return self.key_places.write(k_BTGK, rows, end), self.value_places.write(v_BTGV, rows, end)

    def erase(self, rows: Rows) -> None:
        # compressed keys are computed again
        self.key_places.erase(rows)
        self.value_places.erase(rows)

    def hold(self, tokens: int) -> None:
        self.key_places.hold(tokens)
        self.value_places.hold(tokens)

    def count(self, tokens: int) -> None:
        self.key_places.length = self.value_places.length = tokens


class SparseCache(AttentionCache):
    """Keys, values and two tiers of compressed keys, each computed once, when its window completes."""

    def __init__(self, config: MiniCPMSALAConfig, reserve: int = 0):
        super().__init__(config, reserve)
        self.windows = config.sparse_geometry.windows
        self.tiers = [GrowingTensor(reserve // stride) for _, stride in self.windows.tiers]

    @classmethod
    def bytes_after(cls, config: MiniCPMSALAConfig, length: int, itemsize: int) -> int:
        assert config.num_key_value_heads is not None and config.head_dim is not None
        windows = sum(num_windows(length, size, stride) for size, stride in config.sparse_geometry.windows.tiers)
        compressed = windows * config.num_key_value_heads * config.head_dim * itemsize
        return super().bytes_after(config, length, itemsize) + compressed

    def tensors(self) -> list[GrowingTensor]:
        return [*super().tensors(), *self.tiers]

    def compressed(self, k_BSGK: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return both tiers (B, N, G, K) for all keys so far; each row's windows are computed when they complete."""
        if rows.recorded is not None:
            return self._compressed_by_step(rows.recorded)
        total = k_BSGK.shape[1]
        for tier, (size, stride) in zip(self.tiers, self.windows.tiers, strict=True):
            filled = tier.extend_to(num_windows(total, size, stride), k_BSGK)
            for row, begin, end in _stretches(rows, total):
                done, complete = num_windows(begin, size, stride), num_windows(end, size, stride)
                if complete > done:
                    keys = k_BSGK[row, done * stride : (complete - 1) * stride + size]
                    filled[row, done:complete] = compress(keys, size, stride)
        fine, coarse = (tier.filled for tier in self.tiers)
        assert fine is not None and coarse is not None
        return fine, coarse

    def _compressed_by_step(self, step: Recorded) -> tuple[Tensor, Tensor]:
        """Return both tiers up to the capacity, having written the newest window of each, again if it is not new.

        Before the first window is complete its place takes the mean of what there is, which no query reads.
        """
        assert self.key_places.buffer is not None
        tiers = []
        sizes = self.windows.tiers
        for tier, (size, stride), (newest_B, places_BC) in zip(self.tiers, sizes, step.windows, strict=True):
            tier.put(newest_B, compress(self.key_places.take(places_BC), size, stride))
            tiers.append(tier.first(num_windows(step.capacity, size, stride)))
        fine, coarse = tiers
        return fine, coarse

    def hold(self, tokens: int) -> None:
        # a first window is always there to be written
        tokens = max(tokens, *(size for size, _ in self.windows.tiers))
        super().hold(tokens)
        for tier, (size, stride) in zip(self.tiers, self.windows.tiers, strict=True):
            tier.hold(num_windows(tokens, size, stride))

    def count(self, tokens: int) -> None:
        super().count(tokens)
        for tier, (size, stride) in zip(self.tiers, self.windows.tiers, strict=True):
            tier.length = num_windows(tokens, size, stride)


class LightningCache(LayerCache):
    """One float32 state (B, H, K, V) whatever the length."""

    def __init__(self, config: MiniCPMSALAConfig, reserve: int = 0):
        super().__init__()
        self.state_BHKV: Tensor | None = None

    @classmethod
    def bytes_after(cls, config: MiniCPMSALAConfig, length: int, itemsize: int) -> int:
        assert config.lightning_nh is not None and config.lightning_head_dim is not None
        value_width = config.v_head_dim or config.lightning_head_dim
        return config.lightning_nh * config.lightning_head_dim * value_width * torch.float32.itemsize

    def tensors(self) -> list[GrowingTensor]:
        return []

    def select(self, rows: Tensor) -> None:
        if self.state_BHKV is not None:
            self.state_BHKV = self.state_BHKV.index_select(0, rows.to(self.state_BHKV.device))

    def rows_held(self) -> int:
        return 0 if self.state_BHKV is None else self.state_BHKV.shape[0]

    @property
    def size_bytes(self) -> int:
        return 0 if self.state_BHKV is None else self.state_BHKV.numel() * self.state_BHKV.element_size()

    def initial(self, rows: Rows, like: Tensor) -> Tensor | None:
        """Return the state before `rows`."""
        return self.state_BHKV

    def keep(self, state_BHKV: Tensor, rows: Rows) -> None:
        """Remember the state after `rows`."""
        if rows.recorded is not None and self.state_BHKV is not None:
            # where the next step, launched as this one, will look for it
            self.state_BHKV.copy_(state_BHKV)
        else:
            self.state_BHKV = state_BHKV

    def reset(self) -> None:
        self.state_BHKV = None

    def mark(self, *, copied: bool = True) -> Any:
        return self.state_BHKV.clone() if copied and self.state_BHKV is not None else self.state_BHKV

    def rewind(self, mark: Any) -> None:
        self.state_BHKV = None if mark is None else mark.clone()


class SalaCache(Cache):
    """All layers' caches and the count of columns (tokens, padding included) seen so far; `new_cache` makes an empty one."""

    # as DynamicCache: there is none
    max_cache_len = -1

    def __init__(self, layers: list[LayerCache]):
        super().__init__(layers=list(layers))
        self.columns = 0
        self.seen = SeenTokens()
        self.torn = False

    @property
    def of_layers(self) -> list[LayerCache]:
        """The caches of the layers, in their order."""
        return cast(list[LayerCache], self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def rows_held(self) -> int:
        """Return the number of batch rows, 0 where nothing has been read."""
        return self.of_layers[0].rows_held()

    def read(self, ids_BT: Tensor | None, columns: int) -> None:
        """Take note of `columns` more tokens, which all layers have read; ids: None where they are not known."""
        self.columns += columns
        self.seen.append(ids_BT)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.seen.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.seen.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.rows_held()).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self.seen.select(rows)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run a block that changes states in place: unless it ends without an exception, the cache is torn and refused.

        Raises:
            InputError: an exception has left the cache in the middle of an earlier step.
        """
        if self.torn:
            raise InputError(
                "this cache was left in the middle of a step by an exception; expected a new cache, or `rewind` to a mark"
            )
        self.torn = True
        yield
        self.torn = False

    @contextmanager
    def all_or_nothing(self, rows: Rows) -> Iterator[None]:
        """Run a block that reads `rows`: an exception in it leaves the cache as it was before.

        Raises:
            InputError: as in `step`.
        """
        with self.step():
            mark = self.mark(copied=False)
            for layer in self.of_layers:
                layer.open = True
            try:
                yield
            except BaseException:
                for layer in self.of_layers:
                    layer.erase(rows)
                self.rewind(mark)
                raise
            finally:
                for layer in self.of_layers:
                    layer.open = False

    @property
    def tiers(self) -> tuple[tuple[int, int], ...]:
        """(size, stride) of the tiers of compressed keys, none without block-sparse layers."""
        return next((layer.windows.tiers for layer in self.layers if isinstance(layer, SparseCache)), ())

    def hold(self, tokens: int) -> None:
        """Have memory for a sequence of that many tokens, which stays where it is as long as no more are read."""
        for layer in self.of_layers:
            layer.hold(tokens)

    def count(self, tokens: int) -> None:
        """Take note that steps whose positions only the device knew have made every row so many tokens long."""
        self.columns = tokens
        self.seen.cut(tokens)
        for layer in self.of_layers:
            layer.count(tokens)

    def reset(self) -> None:
        super().reset()
        self.columns, self.seen, self.torn = 0, SeenTokens(), False

    def mark(self, *, copied: bool = True) -> Any:
        """Return a mark of this moment for `rewind`: lengths, and a copy of the recurrent states (keys are not copied).

        The batch rows must stay the same ones in between. copied: as in `LayerCache.mark`.
        """
        return self.columns, [layer.mark(copied=copied) for layer in self.of_layers]

    def rewind(self, mark: Any) -> None:
        """Forget everything that was read after `mark`; the mark can be used again."""
        self.columns, marks = mark
        for layer, own in zip(self.of_layers, marks, strict=True):
            layer.rewind(own)
        self.seen.cut(self.columns)
        self.torn = False

    @property
    def size_bytes(self) -> int:
        """Bytes of what has been written; memory reserved ahead is not counted."""
        return sum(layer.size_bytes for layer in self.of_layers)


def given(cache: Any, past_key_values: Any) -> SalaCache | None:
    """Return the cache that a caller gave by either of its two names.

    Raises:
        InputError: a cache of another kind, or two caches.
    """
    caches = [each for each in (cache, past_key_values) if each is not None]
    for each in caches:
        if not isinstance(each, SalaCache):
            raise InputError(
                f"the cache is a {type(each).__name__}, which has keys and values only; expected a SalaCache "
                "(sala.model.new_cache). Prefix tuning makes such a cache and is not supported"
            )
    if len(caches) == 2 and caches[0] is not caches[1]:
        raise InputError("cache and past_key_values are two caches; expected one, by either name")
    return caches[0] if caches else None


def _stretches(rows: Rows, total: int) -> Iterable[tuple[slice, int, int]]:
    """Yield rows that go on alike, and from where to where: how many tokens they had, and have."""
    if rows.ragged is None:
        assert rows.start is not None
        return [(slice(None), rows.start, total)]
    each = enumerate(zip(rows.ragged.begins, rows.ragged.ends, strict=True))
    return [(slice(row, row + 1), begin, end) for row, (begin, end) in each]
