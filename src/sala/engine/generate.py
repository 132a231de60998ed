"""An answer to a prompt: prefill in chunks, then one token at a time."""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sala.engine.graph import GraphDecoder, why_not_capturable
from sala.engine.memory import peak_bytes
from sala.engine.reading import DEFAULT_CHUNK, read
from sala.engine.sampling import NO_TOKEN, Sampler, Sampling
from sala.engine.transcript import Transcript
from sala.errors import InputError
from sala.model import MiniCPMSALAForCausalLM, SalaCache, new_cache
from sala.model.finite import refuse_logits
from sala.model.interface import named
from sala.model.rope import trained_length

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an answer cost; `peak_bytes` is the most memory that the process has had so far, weights included.

    Of the device where the model is on a GPU, else resident. prompt_tokens: those that were read for this answer.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_s: float
    first_token_s: float
    decode_s: float
    cache_bytes: int
    peak_bytes: int

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        """Of the tokens after the first, which prefill gives; 0 when there are none."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer: its text, its tokens, why it ended, and what it cost.

    finish: "end" (the model ended it), "stop" (a stop string), "length" (as many tokens as allowed). `tokens` holds all
    that were drawn, those of the stop string included, the end token not.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Literal["end", "stop", "length"]
    statistics: Statistics


@torch.inference_mode()
def prefill(
    model: MiniCPMSALAForCausalLM,
    ids_1T: Tensor,
    cache: SalaCache,
    chunk: int,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Read `ids_1T`, int64 (1, T), into `cache` in chunks and return the last position's logits (1, X) float32.

    on_tokens: called after every chunk with the number of tokens read in it.
    """
    last = torch.tensor([ids_1T.shape[1] - 1])
    *_, logits_11X = read(model, ids_1T, last, cache, chunk=chunk, on_tokens=on_tokens)
    return logits_11X[:, -1]


@torch.inference_mode()
def generate(
    model: MiniCPMSALAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    chunk: int = DEFAULT_CHUNK,
    graph: bool | None = None,
    cache: SalaCache | None = None,
    warn: bool = True,
    on_prefill: Callable[[int], None] = lambda tokens: None,
    on_text: Callable[[str], None] = lambda piece: None,
) -> Generation:
    """Answer the token ids `prompt`.

    chunk: tokens of the prompt read in one forward pass; it changes memory and speed, not the answer.
    cache: holds a start of the prompt, which is not read again, and is left at the end of the answer; None: a new one.
    warn: log a warning where the prompt is longer than the model was trained for.
    graph: whether a recorded step is replayed to decode (a CUDA graph, or calls of C++); None: where it can.
    on_prefill: called after every chunk with its number of tokens.
    on_text: called with every piece of text that is certain.

    Raises:
        InputError: a graph is asked for and cannot be recorded here, or a stop string holds more than a special token.
        CheckpointError: the logits are not finite.
    """
    recorded = _records(model, graph)
    if warn:
        _warn_beyond_training(model, len(prompt))
    device = model.device
    cache = new_cache(model.config, reserve=len(prompt) + sampling.max_new_tokens) if cache is None else cache
    known = cache.get_seq_length()
    seen_1T = torch.empty(1, len(prompt) + sampling.max_new_tokens, dtype=torch.long, device=device)
    seen_1T[0, : len(prompt)] = torch.tensor(prompt, device=device)
    ends, stops = end_tokens(model, tokenizer), stop_tokens(tokenizer, sampling.stop)
    sampler, transcript = Sampler(sampling, device), Transcript(tokenizer, sampling.stop)
    finish: Literal["end", "stop", "length"] = "length"
    started = time.perf_counter()
    logits_1X = prefill(model, seen_1T[:, known : len(prompt)], cache, chunk, on_prefill)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    prefill_s = time.perf_counter() - started
    first_token_s = 0.0
    tokens: list[int] = []
    with closing(decode(model, cache, seen_1T, len(prompt), logits_1X, sampler, recorded)) as tokens_drawn:
        for token in islice(tokens_drawn, sampling.max_new_tokens):
            first_token_s = first_token_s or time.perf_counter() - started
            if token == NO_TOKEN:
                raise refuse_logits(model, "the model")
            if token in ends:
                finish = "end"
                break
            tokens.append(token)
            _pass_on(transcript.add(token), on_text)
            if transcript.stopped or token in stops:
                finish = "stop"
                break
    _pass_on(transcript.finish(), on_text)
    statistics = Statistics(
        prompt_tokens=len(prompt) - known,
        # the end token was drawn too
        new_tokens=len(tokens) + (finish == "end"),
        prefill_s=prefill_s,
        first_token_s=first_token_s,
        decode_s=time.perf_counter() - started - first_token_s,
        cache_bytes=cache.size_bytes,
        peak_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_bytes(),
    )
    return Generation(transcript.text, tuple(tokens), finish, statistics)


def _warn_beyond_training(model: MiniCPMSALAForCausalLM, tokens: int) -> None:
    longest = trained_length(model.config)
    if longest is not None and tokens > longest:
        log.warning(
            "the prompt has %s tokens, more than the %s positions that the model was trained on; expect a poor answer",
            f"{tokens:,}",
            f"{longest:,}",
        )


def _records(model: MiniCPMSALAForCausalLM, graph: bool | None) -> bool:
    why_not = why_not_capturable(model)
    if graph and why_not is not None:
        raise InputError(f"no step can be recorded: {why_not}; ask for none (--no-graph)")
    if graph is None and why_not is not None and model.device.type == "cuda":
        log.info("decoding without a recorded step: %s", why_not)
    return why_not is None and graph is not False


def decode(
    model: MiniCPMSALAForCausalLM,
    cache: SalaCache,
    seen_1S: Tensor,
    length: int,
    logits_1X: Tensor,
    sampler: Sampler,
    recorded: bool,
) -> Generator[int, None, None]:
    """Yield tokens as they are drawn, writing them behind the first `length` of `seen_1S`; `logits_1X` are the first's."""
    token_1 = sampler.draw(seen_1S[:, :length], logits_1X)
    seen_1S[:, length] = token_1
    yield int(token_1)
    if recorded:
        decoder = GraphDecoder(model, cache, seen_1S, length + 1, sampler)
        try:
            while True:
                yield int(decoder.next())
        finally:
            decoder.finish()
    while True:
        length += 1
        logits_1X = model(seen_1S[:, length - 1 : length], **named(cache), use_cache=True).logits[:, -1]
        token_1 = sampler.draw(seen_1S[:, :length], logits_1X)
        seen_1S[:, length] = token_1
        yield int(token_1)


def end_tokens(model: MiniCPMSALAForCausalLM, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: the generation configuration's, else the model's, else the tokenizer's."""
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def stop_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> frozenset[int]:
    """Return the ids of those stop strings that are special tokens, which the text of an answer never has in it.

    Raises:
        InputError: a stop string has a special token and something else in it.
    """
    special: list[str] = tokenizer.all_special_tokens
    for text in stop:
        if text not in special and (held := [token for token in special if token in text]):
            raise InputError(
                f"stop string {text!r} holds the special token {held[0]!r}; expected the token alone, or text"
            )
    return frozenset(tokenizer.get_vocab()[text] for text in stop if text in special)


def _pass_on(piece: str, on_text: Callable[[str], None]) -> None:
    if piece:
        on_text(piece)
