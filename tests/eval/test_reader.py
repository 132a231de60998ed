"""A local model as a reader: the same answers whatever is shared or read together."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sala.engine import Sampling, generate
from sala.errors import MemoryLimitError
from sala.eval import Answer, LocalReader, Prompt, Request, Window


def request(key: int, tokens: list[int]) -> Request:
    return Request(key, Prompt((), (), 6), tuple(tokens))


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_are_those_of_prompts_asked_alone(tiny_hybrid: Any, tokenizer: Any, batch: int) -> None:
    rng = np.random.default_rng(0)
    start, middle = rng.integers(0, 200, 150).tolist(), rng.integers(0, 200, 90).tolist()
    prompts = [
        [*start, *middle, 5],
        [*start, *middle, 6, 7],
        [*start, 9, 9],
        [*start, 10],
        rng.integers(0, 200, 40).tolist(),
        [*start, *middle],
    ]
    reader = LocalReader(tiny_hybrid, tokenizer, chunk=64, length=512, batch=batch)
    answers = dict(reader.generate(request(i, tokens) for i, tokens in enumerate(prompts)))
    for i, tokens in enumerate(prompts):
        alone = generate(tiny_hybrid, tokenizer, tokens, Sampling(max_new_tokens=6), chunk=64)
        assert answers[i] == Answer(alone.text, alone.finish, read_tokens=len(tokens))


def test_prompts_are_taken_as_answers_come(tiny_hybrid: Any, tokenizer: Any) -> None:
    taken: list[int] = []

    def asked() -> Iterator[Request]:
        for i in range(6):
            taken.append(i)
            yield request(i, [7, 8, i])

    answers = LocalReader(tiny_hybrid, tokenizer, length=512, batch=2).generate(asked())
    next(answers)
    assert len(taken) == 2
    assert len(list(answers)) == 5


def test_a_prompt_that_memory_is_not_set_aside_for_is_refused(tiny_hybrid: Any, tokenizer: Any) -> None:
    with pytest.raises(MemoryLimitError):
        list(LocalReader(tiny_hybrid, tokenizer, length=64).generate([request(0, [5] * 4000)]))


def test_windows_read_together_are_predicted_as_alone(tiny_hybrid: Any) -> None:
    rng = np.random.default_rng(1)
    windows = [
        Window(rng.integers(0, 200, size), np.array(asked))
        for size, asked in ((70, [1, 40, 69]), (70, [2, 3]), (50, [49]), (70, [69]))
    ]
    together = dict(LocalReader(tiny_hybrid, batch=3, chunk=32).predict(enumerate(windows)))
    for key, window in enumerate(windows):
        with torch.no_grad():
            logits_TX = tiny_hybrid(input_ids=torch.from_numpy(window.tokens)[None], use_cache=False).logits[0]
        wanted = logits_TX.log_softmax(-1)[window.asked - 1, window.tokens[window.asked]]
        np.testing.assert_allclose(together[key].log_probs, wanted.numpy(), atol=1e-4)
        likeliest = logits_TX.argmax(-1)[window.asked - 1].numpy()
        np.testing.assert_array_equal(together[key].right, likeliest == window.tokens[window.asked])
