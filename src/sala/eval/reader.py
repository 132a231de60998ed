"""What answers: a local model, or a server (`endpoint.py`). Both take the same requests."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sala.engine import DEFAULT_CHUNK, Sampling, generate, read
from sala.errors import InputError
from sala.eval.task import Predictions, Prompt, Window
from sala.model import new_cache

# tokens that two prompts share before it pays to keep them
WORTH_KEEPING = 64


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

    A start that a prompt has in common with the one before is read once. Windows of one length are read together.

    tokenizer: turns answers into text; needed by `generate` alone. batch: windows read together.
    sampling: how answers are drawn; their length is the prompt's.
    on_tokens: called with the tokens read, chunk by chunk.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "model",
        chunk: int = DEFAULT_CHUNK,
        batch: int = 1,
        sampling: Sampling | None = None,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.chunk, self.batch, self.on_tokens = chunk, batch, on_tokens
        self.sampling = Sampling() if sampling is None else sampling

    @torch.inference_mode()
    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]:
        if self.tokenizer is None:
            raise InputError("a reader without a tokenizer answers no prompts; expected LocalReader(model, tokenizer)")
        cache: Any = None
        # lengths of starts that the cache can be taken back to, and how
        marks: list[tuple[int, Any]] = []
        for request, following in _with_next(requests):
            tokens = request.tokens
            if marks:
                cache.rewind(marks[-1][1])
            else:
                cache = new_cache(self.model.config, reserve=len(tokens) + request.prompt.max_new_tokens)
            shared = 0 if following is None else common_start(tokens[:-1], following.tokens[:-1])
            known = marks[-1][0] if marks else 0
            if shared - known >= WORTH_KEEPING:
                self._read(tokens[known:shared], cache)
                marks.append((shared, cache.mark()))
            yield request.key, self._answer(request, cache)
            marks = [mark for mark in marks if mark[0] <= shared]

    def predict(self, windows: Iterable[tuple[Any, Window]]) -> Iterator[tuple[Any, Predictions | Answer]]:
        remaining = iter(windows)
        while together := list(islice(remaining, self.batch)):
            rows: dict[int, list[tuple[Any, Window]]] = {}
            for row in together:
                rows.setdefault(len(row[1].tokens), []).append(row)
            for alike in rows.values():
                predicted = self._predict([window for _, window in alike])
                yield from zip([key for key, _ in alike], predicted, strict=True)

    def _answer(self, request: Request, cache: Any) -> Answer:
        assert self.tokenizer is not None
        sampling = replace(self.sampling, max_new_tokens=request.prompt.max_new_tokens)
        said = generate(
            self.model,
            self.tokenizer,
            request.tokens,
            sampling,
            chunk=self.chunk,
            cache=cache,
            warn=False,
            on_prefill=self.on_tokens,
        )
        return Answer(said.text, said.finish, read_tokens=len(request.tokens))

    def _read(self, tokens: Sequence[int], cache: Any) -> None:
        ids_1T = torch.tensor([tokens], device=_device(self.model))
        nothing = torch.zeros(0, dtype=torch.long)
        for _ in read(self.model, ids_1T, nothing, cache, chunk=self.chunk, on_tokens=self.on_tokens):
            pass

    @torch.inference_mode()
    def _predict(self, windows: list[Window]) -> list[Predictions]:
        """Read windows of one length together; only numbers of asked tokens are kept, never a chunk's logits."""
        ids_BT = torch.from_numpy(np.stack([window.tokens for window in windows])).to(_device(self.model))
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


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two prompts share at their start."""
    number = min(len(first), len(second))
    differ = np.flatnonzero(np.asarray(first[:number]) != np.asarray(second[:number]))
    return int(differ[0]) if len(differ) else number


def _log_probs(logits_BNX: Tensor, targets_BN: Tensor) -> Tensor:
    logits_BNX = logits_BNX.float()
    chosen_BN = logits_BNX.gather(-1, targets_BN[..., None])[..., 0]
    return (chosen_BN - logits_BNX.logsumexp(dim=-1)).double().cpu()


def _device(model: Any) -> torch.device:
    """Return the device of the model's parameters; the CPU for one without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _with_next(requests: Iterable[Request]) -> Iterator[tuple[Request, Request | None]]:
    following = iter(requests)
    current = next(following, None)
    while current is not None:
        upcoming = next(following, None)
        yield current, upcoming
        current = upcoming
