"""The layers of a decoding step recorded once as calls of C++, and run again with one call a token."""

import torch
from torch import Tensor

from sala.errors import BackendError
from sala.model import MiniCPMSALAForCausalLM, SalaCache
from sala.model.cache import AttentionCache, LayerCache, LightningCache, SparseCache
from sala.model.growing import GrowingTensor
from sala.model.kinds import LIGHTNING
from sala.model.rows import Recorded, Rows
from sala.ops import native
from sala.ops.infllm import num_windows

_PUT = native.Function("sala_put", "pi pi p ii")
_COPY = native.Function("sala_copy", "pp i")
_COMPRESS = native.Function("sala_compress_newest", "i pi pi p iiiii")


def why_not_recordable(model: MiniCPMSALAForCausalLM) -> str | None:
    """Return why a model's steps cannot be recorded on the CPU, None when they can."""
    if (why_not := native.unavailable()) is not None:
        return f"the kernels in C++ are not used ({why_not})"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"the model is {model.dtype}; the kernels in C++ take float32 and bfloat16"
    if model.config.attn_logits_scaling is not None and set(model.config.mixer_types) != {LIGHTNING}:
        return "attn_logits_scaling is computed by torch at every token"
    hooked = next(
        (name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks), None
    )
    return None if hooked is None else f"{hooked or 'the model'} has a hook, which wants to see every step"


class RecordedStep:
    """The layers' part of a step: one token a row, at positions int64 (B,) that are read anew each time.

    Tensors of `cache`, which `hold`s `capacity` places, must stay where they are.

    Raises:
        BackendError: something in a layer cannot be recorded; the cache is as it was.
    """

    def __init__(
        self, model: MiniCPMSALAForCausalLM, cache: SalaCache, ids_B1: Tensor, positions_B: Tensor, capacity: int
    ):
        self.network = model.model
        self.placed = Rows(positions_B[:, None], Recorded(capacity, ()))
        self.rows = self.network.rotated(self.placed)
        self.hidden_B1D = self.network.embedded(ids_B1).clone()
        marks = [(layer, layer.mark()) for layer in cache.of_layers if isinstance(layer, LightningCache)]
        try:
            self.tape, self.out_B1D = self._record(cache)
        except BackendError:
            for layer, mark in marks:
                layer.rewind(mark)
            raise

    def run(self, ids_B1: Tensor) -> Tensor:
        """Return the last hidden state (B, 1, D) after tokens ids; the next run overwrites it."""
        self.hidden_B1D.copy_(self.network.embedded(ids_B1))
        if self.rows.rotation is not None:
            new = self.network.rotated(self.placed).rotation
            assert new is not None
            for table, values in zip(self.rows.rotation, new, strict=True):
                table.copy_(values)
        self.tape.replay()
        return self.out_B1D

    def _record(self, cache: SalaCache) -> tuple[native.Tape, Tensor]:
        caches = [_recorded(layer, self.rows.positions_BT) for layer in cache.of_layers]
        with native.record() as tape:
            hidden = self.hidden_B1D
            for layer, layer_cache in zip(self.network.layers, caches, strict=True):
                hidden = layer(hidden, self.rows, layer_cache)
            return tape, self.network.norm(hidden)


class _Keys:
    """A cache of keys and values that is written at the positions in memory."""

    open = True

    def __init__(self, cache: AttentionCache, positions_B1: Tensor):
        self.cache, self.positions_B1 = cache, positions_B1

    def append(self, k_B1GK: Tensor, v_B1GV: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        assert rows.recorded is not None
        places = (self.cache.key_places, k_B1GK), (self.cache.value_places, v_B1GV)
        for growing, new_B1 in places:
            buffer, new_B1 = _buffer(growing), new_B1.contiguous()
            place = new_B1[0].numel() * new_B1.element_size()
            _PUT(
                buffer.data_ptr(), buffer.stride(0) * buffer.element_size(), new_B1.data_ptr(), place,
                self.positions_B1.data_ptr(), len(new_B1), place,
            )  # fmt: skip
        return self.cache.key_places.first(rows.recorded.capacity), self.cache.value_places.first(
            rows.recorded.capacity
        )

    def compressed(self, k_BSGK: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        assert isinstance(self.cache, SparseCache) and rows.recorded is not None
        keys, tiers = _buffer(self.cache.key_places), []
        for tier, (size, stride) in zip(self.cache.tiers, self.cache.windows.tiers, strict=True):
            means = _buffer(tier)
            _COMPRESS(
                keys.dtype == torch.bfloat16, keys.data_ptr(), keys.shape[1], means.data_ptr(), means.shape[1],
                self.positions_B1.data_ptr(), len(keys), *keys.shape[2:], size, stride,
            )  # fmt: skip
            tiers.append(tier.first(num_windows(rows.recorded.capacity, size, stride)))
        return tiers[0], tiers[1]


class _State:
    """A cache of states that are copied to where they were."""

    open = True

    def __init__(self, cache: LightningCache):
        self.cache = cache

    def initial(self, rows: Rows, like: Tensor) -> Tensor | None:
        return self.cache.state_BHKV

    def keep(self, state_BHKV: Tensor, rows: Rows) -> None:
        held = self.cache.state_BHKV
        assert held is not None and held.is_contiguous() and held.shape == state_BHKV.shape
        _COPY(held.data_ptr(), state_BHKV.data_ptr(), held.numel() * held.element_size())


def _recorded(layer: LayerCache, positions_B1: Tensor) -> _Keys | _State:
    if isinstance(layer, LightningCache):
        return _State(layer)
    assert isinstance(layer, AttentionCache)
    return _Keys(layer, positions_B1)


def _buffer(growing: GrowingTensor) -> Tensor:
    assert growing.buffer is not None and growing.buffer.is_contiguous()
    return growing.buffer
