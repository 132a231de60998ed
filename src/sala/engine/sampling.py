"""How the next token is drawn: options, the checkpoint's own defaults, and the draw."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sala.errors import InputError

DEFAULT_NEW_TOKENS = 256
# logits are divided by a temperature and a penalty: by less than this some leave float32
SMALLEST = 1e-6
# what torch's generators tell apart
NUM_SEEDS = 2**64


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options of one answer.

    temperature 0 takes the likeliest token; top_p 1 and top_k 0 cut nothing; repetition_penalty 1 changes nothing and
    counts the prompt's tokens, as in transformers. presence_penalty and frequency_penalty are subtracted from the logits
    of tokens of the answer so far, once and as often as they came; logit_bias is added (token id, amount). min_p cuts
    tokens below that share of the likeliest's probability. `stop` ends the answer before the first of its strings.

    Raises:
        InputError: a value is out of range, or has no effect beside the others.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (
                self.temperature == 0 or SMALLEST <= self.temperature < math.inf,
                f"0 (the likeliest token), or {SMALLEST:g} and above, finite",
            ),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (self.top_k >= 0, "0 (all) or above"),
            "min_p": (0 <= self.min_p < 1, "0 (nothing) or above, below 1"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "-2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "-2 to 2"),
            "logit_bias": (all(-100 <= bias <= 100 for _, bias in self.logit_bias), "-100 to 100 for each token"),
            "repetition_penalty": (
                SMALLEST <= self.repetition_penalty <= 1 / SMALLEST,
                f"{SMALLEST:g} to {1 / SMALLEST:g}; 1 changes nothing",
            ),
            "seed": (self.seed is None or 0 <= self.seed < NUM_SEEDS, f"0 to {NUM_SEEDS - 1}"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or above"),
            "stop": (all(self.stop), "no empty string"),
        }
        for name, (fits, right) in ranges.items():
            if not fits:
                raise InputError(f"{name} = {getattr(self, name)}; expected {right}")
        cut = next(
            (name for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)) if getattr(self, name) != off), None
        )
        if self.temperature == 0 and cut is not None:
            raise InputError(
                f"{cut} = {getattr(self, cut)} has no effect at temperature 0; expected a temperature too, like 0.9"
            )


def sampling_for(checkpoint: GenerationConfig, **given: Any) -> Sampling:
    """Return the options that a checkpoint's `generation_config.json` recommends, with those `given` (not None) over them.

    A checkpoint that does not ask for sampling gets the likeliest token.
    """
    known = {field.name for field in fields(Sampling)}
    assert given.keys() <= known, given.keys() - known
    given = {name: value for name, value in given.items() if value is not None}
    names = ["repetition_penalty", "max_new_tokens"]
    if checkpoint.do_sample:
        names += ["temperature", "top_p", "top_k"]
    own = {name: value for name in names if (value := getattr(checkpoint, name, None)) is not None}
    if checkpoint.do_sample:
        own.setdefault("temperature", 1.0)
    if given.get("temperature") == 0:
        own = {name: value for name, value in own.items() if name not in ("top_p", "top_k")}
    return Sampling(**{**own, **given})


# what is drawn from logits that are not finite: no token
NO_TOKEN = -1


class AnswerPenalty(LogitsProcessor):
    """Subtracts `presence` from logits of tokens that the answer has, and `frequency` for each time it has them."""

    def __init__(self, presence: float, frequency: float, prompt_length: int):
        self.presence, self.frequency, self.prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer_BT = input_ids[:, self.prompt_length :]
        counts_BX = torch.zeros_like(scores).scatter_add_(1, answer_BT, torch.ones_like(answer_BT, dtype=scores.dtype))
        return scores - self.presence * (counts_BX > 0) - self.frequency * counts_BX


class LogitBias(LogitsProcessor):
    """Adds an amount to the logits of given tokens."""

    def __init__(self, bias: tuple[tuple[int, float], ...], device: torch.device):
        self.ids = torch.tensor([token for token, _ in bias], device=device)
        self.amounts = torch.tensor([amount for _, amount in bias], device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, self.ids, self.amounts.to(scores.dtype).expand(len(scores), -1))


class Sampler:
    """Draws tokens by one set of options; equal seeds draw equal tokens.

    prompt_length: how many of the tokens seen are the prompt's, which penalties of the answer do not count.
    """

    def __init__(self, sampling: Sampling, device: torch.device, prompt_length: int = 0):
        self.greedy = sampling.temperature == 0
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.processors = LogitsProcessorList()
        if sampling.logit_bias:
            self.processors.append(LogitBias(sampling.logit_bias, device))
        # whether the tokens so far matter
        penalties = (sampling.repetition_penalty - 1, sampling.presence_penalty, sampling.frequency_penalty)
        self.needs_seen = any(penalties)
        if sampling.presence_penalty or sampling.frequency_penalty:
            penalty = AnswerPenalty(sampling.presence_penalty, sampling.frequency_penalty, prompt_length)
            self.processors.append(penalty)
        if sampling.repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self.greedy and sampling.temperature != 1:
            self.processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            self.processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.processors.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p:
            self.processors.append(MinPLogitsWarper(sampling.min_p))

    def draw(self, seen_1T: Tensor, logits_1X: Tensor, forbidden_1X: Tensor | None = None) -> Tensor:
        """Return the next token, int64 (1,), from logits (1, X); nothing is read back from their device.

        `NO_TOKEN` when a logit is not finite, for whoever reads the token to notice.

        seen_1T: int64 (1, T), the tokens before it, in any order and as often as one likes; with penalties of the answer
            the prompt's first.
        forbidden_1X: bool, tokens that must not be drawn.
        """
        allowed_1X = logits_1X if forbidden_1X is None else logits_1X.masked_fill(forbidden_1X, -torch.inf)
        scores_1X: Tensor = self.processors(seen_1T, allowed_1X)  # type: ignore[arg-type]
        token_1 = scores_1X.argmax(dim=-1) if self.greedy else self._choose(scores_1X)
        return token_1.masked_fill(~logits_1X.isfinite().all(), NO_TOKEN)

    def _choose(self, scores_1X: Tensor) -> Tensor:
        # the first of exponential clocks to ring (torch.multinomial does the same, but looks at the numbers before)
        clocks_1X = torch.empty_like(scores_1X).exponential_(generator=self.generator)
        return (scores_1X.softmax(dim=-1) / clocks_1X).argmax(dim=-1)
