"""A local model as a reader: the same answers whatever is shared or read together."""

from typing import Any

import numpy as np
import torch

from sala.engine import Sampling, generate
from sala.eval import LocalReader, Prompt, Request, Window
from sala.eval.reader import common_start


def request(key: int, tokens: list[int]) -> Request:
    return Request(key, Prompt((), (), 6), tuple(tokens))


def test_answers_are_those_of_prompts_asked_alone_and_shared_starts_are_read_once(
    tiny_hybrid: Any, tokenizer: Any
) -> None:
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
    read: list[int] = []
    reader = LocalReader(tiny_hybrid, tokenizer, chunk=64, on_tokens=read.append)
    answers = dict(reader.generate(request(i, tokens) for i, tokens in enumerate(prompts)))
    for i, tokens in enumerate(prompts):
        alone = generate(tiny_hybrid, tokenizer, tokens, Sampling(max_new_tokens=6), chunk=64)
        assert answers[i].text == alone.text
    # the second prompt shares all but its end with the first, the fourth its start with the third
    assert sum(read) == sum(map(len, prompts)) - len(start) - len(middle) - len(start)


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


def test_the_common_start_of_two_prompts() -> None:
    assert common_start([1, 2, 3], [1, 2, 4]) == 2
    assert common_start([1, 2], [1, 2, 4]) == 2
    assert common_start([], [1]) == 0
