"""A model's cache goes by both names that versions of transformers have for it."""

import pytest
import torch
from transformers import DynamicCache

from model.shapes import tiny_model, tokens
from sala.errors import InputError
from sala.model import new_cache
from sala.model.interface import CACHE, named


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_a_cache_is_taken_and_returned_by_either_name(name: str) -> None:
    model, ids = tiny_model(), tokens(1, 90)
    expected = model(ids, use_cache=False).logits[:, 60:]
    for net in (model, model.model):
        output = net(ids[:, :60], **{name: new_cache(model.config)})
        assert output[CACHE] is output.past_key_values
        assert output.past_key_values.columns == 60
    torch.testing.assert_close(model(ids[:, 60:], **{name: output.past_key_values}).logits, expected)


def test_two_caches_are_refused() -> None:
    model, ids = tiny_model(), tokens(1, 9)
    with pytest.raises(InputError, match="two caches"):
        model(ids, cache=new_cache(model.config), past_key_values=new_cache(model.config))


def test_a_cache_of_another_kind_is_refused() -> None:
    model, ids = tiny_model(), tokens(1, 30)
    with pytest.raises(InputError, match="DynamicCache, which .* expected a SalaCache"):
        model(ids, cache=DynamicCache())
    with pytest.raises(InputError, match="DynamicCache, which .* expected a SalaCache"):
        model.generate(ids, max_new_tokens=2, **named(DynamicCache()))
