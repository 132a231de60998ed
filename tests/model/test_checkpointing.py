"""Gradient checkpointing, which computes a layer again in the backward pass, changes no gradient."""

from functools import partial

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from model.shapes import tiny_model, tokens
from sala.errors import InputError
from sala.model import MiniCPMSALAForCausalLM, new_cache
from sala.model.decoder import DecoderLayer


def gradients(model: MiniCPMSALAForCausalLM, **options: object) -> dict[str, torch.Tensor | None]:
    ids = tokens(2, 70)
    model.train().enable_input_require_grads()
    output = model(ids, labels=ids, **options)
    output.loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_cache", [None, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, use_cache: bool | None) -> None:
    model = tiny_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    recomputed = gradients(model, use_cache=use_cache)
    for name, gradient in gradients(tiny_model()).items():
        torch.testing.assert_close(recomputed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("implementation", CheckpointImpl)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad", "ignore:.*use_reentrant")
def test_a_layer_with_a_cache_is_never_computed_again(implementation: CheckpointImpl) -> None:
    """As FSDP's wrapper would, of which the model does not know."""
    expected = gradients(tiny_model())
    for use_cache in (False, True):
        model = tiny_model()
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=implementation),
            check_fn=lambda module: isinstance(module, DecoderLayer),
        )
        if use_cache:
            with pytest.raises(InputError, match="computed again"):
                gradients(model, use_cache=True)
        else:
            recomputed = gradients(model, use_cache=False)
            for (name, gradient), other in zip(expected.items(), recomputed.values(), strict=True):
                torch.testing.assert_close(other, gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_a_cache_is_left_out_under_gradient_checkpointing_and_kept_without_gradients() -> None:
    model, ids = tiny_model().train(), tokens(1, 30)
    model.gradient_checkpointing_enable()
    cache = new_cache(model.config)
    assert model(ids, cache=cache, use_cache=True).past_key_values is None
    assert cache.columns == 0
    with torch.no_grad():
        model(ids, cache=cache)
        assert cache.columns == 30
    with pytest.raises(InputError, match="a cache of 30 tokens under gradient checkpointing"):
        model(ids, cache=cache)
