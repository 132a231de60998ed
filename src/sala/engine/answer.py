"""An answer while it is written: draws a token from logits, turns tokens into text, and knows when it ends."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sala.engine.generate import stop_tokens
from sala.engine.request import Finish
from sala.engine.sampling import NO_TOKEN, Sampler, Sampling
from sala.engine.transcript import Transcript


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, the logarithm of its probability before any option of sampling, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Grammar(Protocol):
    """What tokens may come next, and whether the answer may end."""

    def forbidden_1X(self) -> Tensor: ...

    def take(self, token: int) -> None: ...


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What an answer is asked to be.

    logprobs: how many of the likeliest tokens to tell with each token; None: nothing. prompt_logprobs: for the prompt too.
    prompt_only: the prompt is read, and nothing is answered.
    ignore_end: the model's end tokens are tokens as any other. min_new_tokens: before so many the answer does not end.
    """

    sampling: Sampling
    logprobs: int | None = None
    prompt_logprobs: bool = False
    prompt_only: bool = False
    ignore_end: bool = False
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    evidence: bool = False
    grammar: Callable[[], Grammar] | None = None


@dataclass
class Answer:
    """The state of one answer beside its tokens; see `AnswerOptions`."""

    options: AnswerOptions
    tokenizer: PreTrainedTokenizerBase
    end_tokens: Collection[int]
    device: torch.device
    prompt: Sequence[int]
    finish: Finish | None = None
    blocks_N: Tensor | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    num_told: int = 0

    def __post_init__(self) -> None:
        sampling = self.options.sampling
        self.sampler = Sampler(sampling, self.device, len(self.prompt))
        self.transcript = Transcript(self.tokenizer, sampling.stop)
        self.ends = frozenset() if self.options.ignore_end else frozenset(self.end_tokens)
        self.stops = stop_tokens(self.tokenizer, sampling.stop) | set(self.options.stop_token_ids)
        self.grammar = None if self.options.grammar is None else self.options.grammar()

    def draw(self, output: Sequence[int], logits_1X: Tensor) -> int:
        """Return the next token, `NO_TOKEN` where the logits are not finite."""
        seen = [*self.prompt, *output] if self.sampler.needs_seen else []
        seen_1T = torch.tensor([seen], dtype=torch.long, device=self.device)
        token = int(self.sampler.draw(seen_1T, logits_1X, self._forbidden_1X(len(output), logits_1X)))
        if token != NO_TOKEN and self.options.logprobs is not None:
            self.logprobs += token_logprobs(logits_1X, [token], self.options.logprobs)
        return token

    def take(self, output: list[int], token: int) -> str:
        """Add a token to the answer and return the text that is certain now; sets `finish` where it ends the answer."""
        if token in self.ends:
            self.finish = "end"
            return self.transcript.finish()
        output.append(token)
        if self.grammar is not None:
            self.grammar.take(token)
        piece = self.transcript.add(token)
        if self.transcript.stopped or token in self.stops:
            self.finish = "stop"
        elif len(output) == self.options.sampling.max_new_tokens:
            self.finish = "length"
        return piece + self.transcript.finish() if self.finish else piece

    def watch(self, blocks_N: Tensor | None) -> None:
        """Add what the sparse layers chose for one more token."""
        if blocks_N is None:
            return
        if self.blocks_N is not None:
            blocks_N = blocks_N.clone()
            blocks_N[: len(self.blocks_N)] += self.blocks_N
        self.blocks_N = blocks_N

    def _forbidden_1X(self, length: int, logits_1X: Tensor) -> Tensor | None:
        forbidden = None if self.grammar is None else self.grammar.forbidden_1X()
        early = [*self.ends, *self.stops] if length < self.options.min_new_tokens else []
        if early:
            forbidden = torch.zeros_like(logits_1X, dtype=torch.bool) if forbidden is None else forbidden.clone()
            forbidden[:, early] = True
        return forbidden


def token_logprobs(logits_NX: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return the log-probability of each of N tokens, and of the `top` likeliest in its place."""
    logprobs_NX = logits_NX.log_softmax(dim=-1)
    own_N = logprobs_NX.gather(1, torch.tensor(tokens, device=logits_NX.device)[:, None])[:, 0].tolist()
    best = logprobs_NX.topk(min(top, logits_NX.shape[1]), dim=-1)
    rows = zip(tokens, own_N, best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenLogprob(token, own, tuple(zip(ids, values, strict=True))) for token, own, ids, values in rows]
