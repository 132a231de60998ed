"""A forward pass that breaks off (Ctrl-C, out of memory, a hook) leaves the cache as it was, or a cache that is refused."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from model.shapes import TINY_SPARSE, tiny_model, tokens
from sala.engine.graph import GraphDecoder
from sala.engine.sampling import Sampler, Sampling
from sala.errors import InputError
from sala.model import MiniCPMSALAForCausalLM, SalaCache, new_cache

# blocks are chosen, so that compressed keys matter
CHANGES = {"sparse_config": {**TINY_SPARSE, "window_size": 16, "topk": 3}}
LAYERS = range(4)


class Broken(BaseException):
    """Neither an Exception nor a KeyboardInterrupt, so that nothing catches it by its kind."""


@contextmanager
def interrupted(module: nn.Module) -> Iterator[None]:
    """Break off inside the block as soon as the module has run, its output poisoned."""

    def interrupt(_module: nn.Module, _inputs: object, _output: object) -> None:
        raise Broken

    handle = module.register_forward_hook(interrupt)
    with pytest.raises(Broken):
        yield
    handle.remove()


def padded(batch: int, length: int) -> Tensor:
    """A mask whose second row begins with padding, and whose third is padded in its new part too."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1:2, :37], mask[2:, :11], mask[2:, 95:99] = 0, 0, 0
    return mask


def read(model: MiniCPMSALAForCausalLM, ids: Tensor, mask: Tensor, cache: SalaCache, end: int) -> Tensor:
    start = cache.columns
    return model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache).logits


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("before", [0, 90, 110])
@torch.no_grad()
def test_an_interrupted_forward_changes_nothing(batch: int, layer: int, before: int) -> None:
    model, ids, mask = tiny_model(**CHANGES), tokens(batch, 130), padded(batch, 130)
    cache, expected = new_cache(model.config), new_cache(model.config)
    for each in (cache, expected):
        if before:
            read(model, ids, mask, each, before)
    for module in (model.model.layers[layer].self_attn, model.model.layers[layer]):
        with interrupted(module):
            read(model, ids.flip(1), mask, cache, 120)
        assert (cache.get_seq_length(), cache.size_bytes) == (before, expected.size_bytes)
    for end in (111, 130):
        assert torch.equal(read(model, ids, mask, cache, end), read(model, ids, mask, expected, end))


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_no_number_of_an_interrupted_forward_stays(batch: int) -> None:
    """Its keys and values may have been anything, NaN as well: what a mask hides must be finite."""
    model, ids, mask = tiny_model(**CHANGES), tokens(batch, 130), padded(batch, 130)
    cache, expected = new_cache(model.config), new_cache(model.config)
    for each in (cache, expected):
        read(model, ids, mask, each, 90)
    with interrupted(model.model.layers[-1]):
        embeddings = torch.full((batch, 30, model.config.hidden_size), torch.nan)
        model(inputs_embeds=embeddings, attention_mask=mask[:, :120], cache=cache)
    for layer in (cache.layers[0], cache.layers[3]):
        assert all(bool(tensor.buffer.isfinite().all()) for tensor in (layer.key_places, layer.value_places))
    # fewer tokens than the interrupted call had, which leave its places as they are
    for end in (93, 130):
        assert torch.equal(read(model, ids, mask, cache, end), read(model, ids, mask, expected, end))


@torch.no_grad()
def test_an_interrupted_first_call_does_not_keep_its_batch() -> None:
    model, cache = tiny_model(), new_cache(tiny_model().config)
    with interrupted(model.model.layers[-1]):
        model(tokens(2, 30), cache=cache)
    torch.testing.assert_close(model(tokens(3, 40), cache=cache).logits, model(tokens(3, 40)).logits)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_cache_is_refused_after_an_interrupted_decoding_step(layer: int) -> None:
    """GraphDecoder change states in place, which cannot be taken back."""
    model, cache = tiny_model(**CHANGES), new_cache(tiny_model(**CHANGES).config, reserve=100)
    seen = torch.zeros(1, 100, dtype=torch.long)
    seen[:, :71] = tokens(1, 71)
    with torch.inference_mode():
        model(seen[:, :70], cache=cache)
        mark = cache.mark()
        steps = GraphDecoder(model, cache, seen, 71, Sampler(Sampling(), model.device))
        # what is recorded calls no module
        steps.records = False
        steps.next()
        with interrupted(model.model.layers[layer]):
            steps.next()
        steps.finish()
        for use in (steps.next, lambda: model(tokens(1, 3), cache=cache)):
            with pytest.raises(InputError, match="middle of a step"):
                use()
        cache.rewind(mark)
        expected = model(torch.cat([seen[:, :70], tokens(1, 3)], dim=1)).logits[:, -3:]
        torch.testing.assert_close(model(tokens(1, 3), cache=cache).logits, expected, atol=2e-4, rtol=1e-4)
