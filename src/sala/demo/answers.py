"""What several models say to the same prompts, and what that takes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sala import engine
from sala.engine.load import AUTO


@dataclass(frozen=True, slots=True)
class Said:
    """One model's answer. prompt_tokens: with the document that stands before the prompt."""

    model: str
    prompt: str
    text: str
    finish: str
    prompt_tokens: int
    first_token_s: float
    tokens_per_s: float
    cache_bytes: int


def answers(
    models: Sequence[str],
    prompts: Sequence[str],
    *,
    document: str = "",
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chunk: int = engine.DEFAULT_CHUNK,
    dtype: str = AUTO,
    device: str = AUTO,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Said]:
    """Yield each model's answers to all prompts, one model in memory at a time; as `engine.generate`.

    say: takes a line before a model is loaded.

    Raises:
        SalaError: a model is not there, does not fit into memory, or cannot read a prompt.
    """
    for name in models:
        say(f"loading {name}")
        checkpoint = engine.open_checkpoint(name, dtype, device)
        sampling = engine.sampling_for(
            checkpoint.generation, temperature=temperature, seed=seed, max_new_tokens=max_new_tokens
        )
        encoded = [
            engine.encode_prompt(
                checkpoint.tokenizer, engine.join(document, prompt), checkpoint.config.vocab_size, chat
            )
            for prompt in prompts
        ]
        network = engine.load(checkpoint, max(map(len, encoded)) + max_new_tokens, chunk)
        for prompt, ids in zip(prompts, encoded, strict=True):
            answer = engine.generate(network, checkpoint.tokenizer, ids, sampling, chunk=chunk)
            spent = answer.statistics
            yield Said(
                name,
                prompt,
                answer.text.strip(),
                answer.finish,
                len(ids),
                spent.first_token_s,
                spent.decode_tokens_per_s,
                spent.cache_bytes,
            )
