"""Options of drawing a token: defaults of the checkpoint, what overrides them, what has no effect."""

import pytest
import torch
from transformers import GenerationConfig

from sala.engine import Sampling, sampling_for
from sala.engine.sampling import Sampler
from sala.errors import InputError

LOGITS = torch.tensor([[0.0, 3.0, 2.0, 1.0, -1.0]])
SEEN = torch.tensor([[1, 1]])


def drawn(sampling, times=200):
    sampler = Sampler(sampling, torch.device("cpu"))
    return [int(sampler.draw(SEEN, LOGITS)) for _ in range(times)]


def test_temperature_zero_takes_the_likeliest():
    assert set(drawn(Sampling(), 5)) == {1}


def test_a_seed_repeats_the_draw():
    first = drawn(Sampling(temperature=1.0, seed=7))
    assert first == drawn(Sampling(temperature=1.0, seed=7))
    assert first != drawn(Sampling(temperature=1.0, seed=8))


@pytest.mark.parametrize(
    ("options", "possible"),
    [({"top_k": 2}, {1, 2}), ({"top_p": 0.5}, {1}), ({"top_p": 0.75}, {1, 2}), ({}, {0, 1, 2, 3, 4})],
)
def test_only_the_likeliest_tokens_are_drawn(options, possible):
    assert set(drawn(Sampling(temperature=1.0, seed=0, **options), 800)) == possible


def test_a_low_temperature_sharpens():
    assert drawn(Sampling(temperature=0.1, seed=0)).count(1) > drawn(Sampling(temperature=2.0, seed=0)).count(1)


def test_what_was_seen_is_penalised():
    assert set(drawn(Sampling(repetition_penalty=2.0), 3)) == {2}


def test_a_checkpoint_that_asks_for_sampling_gets_its_own_options():
    checkpoint = GenerationConfig(do_sample=True, temperature=0.9, top_p=0.8, top_k=20, max_new_tokens=9)
    assert sampling_for(checkpoint) == Sampling(temperature=0.9, top_p=0.8, top_k=20, max_new_tokens=9)
    assert sampling_for(checkpoint, top_p=0.5).top_p == 0.5
    assert sampling_for(checkpoint, temperature=0.0) == Sampling(max_new_tokens=9)


def test_a_checkpoint_that_does_not_gets_the_likeliest_token():
    assert sampling_for(GenerationConfig()) == Sampling()
    assert sampling_for(GenerationConfig(), temperature=0.9).temperature == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p = 0.0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k = -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"stop": ("a", "")}, "no empty string"),
        ({"top_p": 0.5}, "top_p = 0.5 has no effect at temperature 0"),
        ({"top_k": 5}, "top_k = 5 has no effect at temperature 0"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)
