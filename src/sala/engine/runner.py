"""Sequences on a model: opened, extended, copied, kept and freed. Nothing above knows how the model stores them."""

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from sala.engine.watch import Watch
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, SalaCache, new_cache
from sala.model.cache import AttentionCache, LightningCache, SparseCache
from sala.model.growing import GrowingTensor
from sala.model.interface import named
from sala.model.report import cache_bytes, cache_bytes_per_token
from sala.ops.infllm import num_windows

# pages have at least so many tokens
PAGE_TOKENS = 64


@dataclass(eq=False)
class Sequence:
    """What a model remembers of one text."""

    cache: SalaCache

    @property
    def length(self) -> int:
        return self.cache.columns


@dataclass(frozen=True, slots=True)
class Extension:
    """Tokens that a sequence reads.

    every: logits of all of them are wanted, not of the last alone. watched: also which blocks its sparse layers read.
    """

    sequence: Sequence
    tokens: Many[int]
    every: bool = False
    watched: bool = False


@dataclass(frozen=True, slots=True)
class Extended:
    """Logits (N, X) float32 of the last token or of every one; blocks: attention to each, (blocks,) float32."""

    logits_NX: Tensor
    blocks_N: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys, values and compressed keys of the tokens [start, end), by layer; () for a layer that has none."""

    start: int
    end: int
    tensors: tuple[tuple[Tensor, ...], ...]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for layer in self.tensors for tensor in layer)


@dataclass(frozen=True, slots=True)
class States:
    """The states (1, H, K, V) of lightning layers after `length` tokens, by layer; None for another layer."""

    length: int
    tensors: tuple[Tensor | None, ...]

    @property
    def size_bytes(self) -> int:
        return sum(state.numel() * state.element_size() for state in self.tensors if state is not None)


def joined(parts: Many[Keys]) -> Keys:
    """Return keys that follow each other as one."""
    layers = zip(*(part.tensors for part in parts), strict=True)
    tensors = tuple(tuple(torch.cat(pieces, dim=1) for pieces in zip(*layer, strict=True)) for layer in layers)
    return Keys(parts[0].start, parts[-1].end, tensors)


def page_tokens(config: MiniCPMSALAConfig) -> int:
    """Return the tokens of a page: whole blocks of a sparse layer."""
    return math.lcm(PAGE_TOKENS, config.sparse_geometry.block_size) if config.sparse_config else PAGE_TOKENS


class Runner:
    """Runs sequences on a model, each with a cache of its own; rows of a call are computed one after the other."""

    def __init__(self, model: MiniCPMSALAForCausalLM):
        self.model = model
        self.config = model.config
        self.page_size = page_tokens(model.config)
        itemsize = model.dtype.itemsize
        self.token_bytes = math.ceil(cache_bytes_per_token(model.config, itemsize))
        self.state_bytes = cache_bytes(model.config, 0, itemsize)

    def open(self, reserve: int = 0) -> Sequence:
        """Return an empty sequence; reserve: tokens to take memory for at once."""
        return Sequence(new_cache(self.config, reserve))

    @torch.inference_mode()
    def extend(self, rows: Many[Extension]) -> list[Extended]:
        """Read new tokens, of any number in each row."""
        return [self._extend(row) for row in rows]

    def _extend(self, row: Extension) -> Extended:
        ids_1T = torch.tensor([list(row.tokens)], device=self.model.device)
        call = {**named(row.sequence.cache), "use_cache": True, "logits_to_keep": 0 if row.every else 1}
        if not row.watched:
            return Extended(self.model(ids_1T, **call).logits[0])
        with Watch(self.model) as watch:
            logits_NX = self.model(ids_1T, **call).logits[0]
        return Extended(logits_NX, watch.blocks_N())

    def states(self, sequence: Sequence) -> States:
        """Return the states as they are now. A layer replaces its state, so that nothing has to be copied."""
        layers = sequence.cache.of_layers
        states = [layer.state_BHKV if isinstance(layer, LightningCache) else None for layer in layers]
        return States(sequence.length, tuple(states))

    @torch.inference_mode()
    def keys(self, sequence: Sequence, start: int, end: int) -> Keys:
        """Return a copy of the keys and values of tokens [start, end), both at the ends of pages."""
        layers = []
        for layer in sequence.cache.of_layers:
            if isinstance(layer, AttentionCache):
                spans = _spans(layer, start, end)
                layers.append(tuple(t.buffer[:, a:b].clone() for t, (a, b) in spans if t.buffer is not None))
            else:
                layers.append(())
        return Keys(start, end, tuple(layers))

    @torch.inference_mode()
    def restore(self, tokens: Many[int], keys: Many[Keys], states: States, reserve: int = 0) -> Sequence:
        """Return a sequence that has read `tokens`: keys in order from the start, states at the end."""
        length = states.length
        assert [part.start for part in keys] == [0, *(part.end for part in keys[:-1])] and keys[-1].end == length
        sequence = self.open(reserve)
        for index, layer in enumerate(sequence.cache.of_layers):
            if isinstance(layer, LightningCache):
                layer.state_BHKV = states.tensors[index]
                continue
            assert isinstance(layer, AttentionCache)
            for place, (tensor, (_, end)) in enumerate(_spans(layer, 0, length)):
                _fill(tensor, [part.tensors[index][place] for part in keys], end)
        sequence.cache.read(torch.tensor([list(tokens)], device=self.model.device), length)
        return sequence

    def free(self, sequence: Sequence) -> None:
        """Forget a sequence; what was kept of it stays."""
        sequence.cache.reset()


def _spans(layer: AttentionCache, start: int, end: int) -> list[tuple[GrowingTensor, tuple[int, int]]]:
    """Return a layer's tensors, and of each the places that belong to tokens [start, end)."""
    spans = [(layer.key_places, (start, end)), (layer.value_places, (start, end))]
    if isinstance(layer, SparseCache):
        for tier, (size, stride) in zip(layer.tiers, layer.windows.tiers, strict=True):
            # a window belongs to the tokens in which it ends
            spans.append((tier, (num_windows(start, size, stride), num_windows(end, size, stride))))
    return spans


def _fill(tensor: GrowingTensor, parts: Many[Tensor], length: int) -> None:
    places = tensor.extend_to(length, parts[0])
    at = 0
    for part in parts:
        places[:, at : at + part.shape[1]] = part
        at += part.shape[1]
    assert at == length
