"""What answers: a local model, or a server (`endpoint.py`). Both take the same requests."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sala.engine import DEFAULT_CHUNK, Sampling, available_bytes, read
from sala.engine.answer import AnswerOptions
from sala.engine.engine import Engine
from sala.engine.events import Done, Event, Piece
from sala.engine.generate import end_tokens
from sala.engine.runner import Runner, page_tokens
from sala.errors import InputError
from sala.eval.task import Predictions, Prompt, Window
from sala.model import new_cache
from sala.model.report import cache_bytes

DEFAULT_LENGTH = 8192
# of the memory that is left after the model is loaded
USED = 0.8
# windows are read together while they have no more tokens: longer ones gain nothing
MOST_TOGETHER = 2**15


@dataclass(frozen=True, slots=True)
class Request:
    """A question for a reader: the prompt, and its tokens as our tokenizer sees them. `key` tells answers apart."""

    key: Any
    prompt: Prompt
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. error: why there is no answer, None when there is one. finish: why it ended, by the reader's word.

    read_tokens: how many tokens the reader says the prompt has; None when it does not say.
    """

    text: str = ""
    finish: str | None = None
    error: str | None = None
    read_tokens: int | None = None


class Reader(Protocol):
    """Answers prompts and predicts tokens. Results come in any order, each with its request's key."""

    name: str

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]: ...

    def predict(self, windows: Iterable[tuple[Any, Window]]) -> Iterator[tuple[Any, Predictions | Answer]]:
        """Yield `Predictions`, or an `Answer` with the error that stands in for them."""
        ...


class LocalReader:
    """A model in this process, on whatever device it is on.

    Answers come from the engine: prompts are answered together, and a start that they share is read once. Windows of one
    length are read together too.

    tokenizer: turns answers into text; needed by `generate` alone. length: the longest prompt with its answer, for which
    memory is set aside. batch: prompts and windows worked on together. sampling: how answers are drawn; their length is
    the prompt's. on_tokens: called with the tokens that `predict` reads, chunk by chunk.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "model",
        length: int = DEFAULT_LENGTH,
        chunk: int = DEFAULT_CHUNK,
        batch: int = 1,
        sampling: Sampling | None = None,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ):
        self.model, self.tokenizer, self.name, self.length = model, tokenizer, name, length
        self.chunk, self.batch, self.on_tokens = chunk, batch, on_tokens
        self.sampling = Sampling() if sampling is None else sampling

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]:
        engine = self._start()
        finished: SimpleQueue[tuple[Any, Answer]] = SimpleQueue()
        running = 0
        try:
            for request in requests:
                sampling = replace(self.sampling, max_new_tokens=request.prompt.max_new_tokens)
                heard = partial(_hear, request, [], finished)
                engine.submit(request.tokens, AnswerOptions(sampling), heard)
                running += 1
                if running == self.batch:
                    yield finished.get()
                    running -= 1
            for _ in range(running):
                yield finished.get()
        finally:
            engine.stop(drain=False)

    def _start(self) -> Engine:
        if self.tokenizer is None:
            raise InputError("a reader without a tokenizer answers no prompts; expected LocalReader(model, tokenizer)")
        whole = cache_bytes(self.model.config, self.length + page_tokens(self.model.config), self.model.dtype.itemsize)
        # one more for what prompts share; the engine lets prompts wait for memory
        wanted, left = (self.batch + 1) * whole, int(available_bytes(self.model.device) * USED)
        runner = Runner(self.model, max(whole, min(wanted, left)), self.batch)
        engine = Engine(runner, self.tokenizer, end_tokens(self.model, self.tokenizer), chunk=self.chunk)
        engine.start()
        return engine

    def predict(self, windows: Iterable[tuple[Any, Window]]) -> Iterator[tuple[Any, Predictions | Answer]]:
        remaining = iter(windows)
        while together := list(islice(remaining, self.batch)):
            rows: dict[int, list[tuple[Any, Window]]] = {}
            for row in together:
                rows.setdefault(len(row[1].tokens), []).append(row)
            for length, alike in rows.items():
                most = max(1, MOST_TOGETHER // length)
                for start in range(0, len(alike), most):
                    part = alike[start : start + most]
                    predicted = self._predict([window for _, window in part])
                    yield from zip([key for key, _ in part], predicted, strict=True)

    @torch.inference_mode()
    def _predict(self, windows: list[Window]) -> list[Predictions]:
        """Read windows of one length together; only numbers of asked tokens are kept, never a chunk's logits."""
        ids_BT = torch.from_numpy(np.stack([window.tokens for window in windows])).to(device_of(self.model))
        asked_N = torch.from_numpy(np.unique(np.concatenate([window.asked for window in windows])))
        cache = new_cache(self.model.config, reserve=ids_BT.shape[1])
        log_probs, right = [], []
        done = 0
        # the last token predicts nothing that is asked, but the cache's length is that of the window
        for logits_BNX in read(self.model, ids_BT, asked_N - 1, cache, chunk=self.chunk, on_tokens=self.on_tokens):
            number = logits_BNX.shape[1]
            targets_BN = ids_BT[:, asked_N[done : done + number].to(ids_BT.device)]
            done += number
            log_probs.append(_log_probs(logits_BNX, targets_BN))
            right.append((logits_BNX.argmax(dim=-1) == targets_BN).cpu())
        log_probs_BN, right_BN = torch.cat(log_probs, dim=1).numpy(), torch.cat(right, dim=1).numpy()
        at = [np.searchsorted(asked_N.numpy(), window.asked) for window in windows]
        return [Predictions(log_probs_BN[row, own], right_BN[row, own]) for row, own in enumerate(at)]


def _hear(request: Request, texts: list[str], finished: SimpleQueue[tuple[Any, Answer]], event: Event) -> None:
    """Take an event of the engine; texts: the pieces of the answer so far."""
    if isinstance(event, Piece):
        texts.append(event.text)
    if isinstance(event, Done):
        if event.finish == "error":
            answer = Answer(error=event.error)
        else:
            answer = Answer("".join(texts), event.finish, read_tokens=event.prompt_tokens)
        finished.put((request.key, answer))


def _log_probs(logits_BNX: Tensor, targets_BN: Tensor) -> Tensor:
    logits_BNX = logits_BNX.float()
    chosen_BN = logits_BNX.gather(-1, targets_BN[..., None])[..., 0]
    return (chosen_BN - logits_BNX.logsumexp(dim=-1)).double().cpu()


def device_of(model: Any) -> torch.device:
    """Return the device of the model's parameters; the CPU for one without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
