"""A task is data and a scorer. It knows no model: samples are a pure function of the setting, a length and an index."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sala.data.chat import ChatTemplate, Message, TemplateRefusal
from sala.data.text import TextEncoder, around
from sala.errors import InputError

Style = Literal["nvidia", "lm-eval", "opencompass"]
STYLES: tuple[Style, ...] = ("nvidia", "lm-eval", "opencompass")
THOUGHTS_RULE = "the answer is what follows the last </think>; an unclosed <think> leaves no answer"
_THOUGHTS = re.compile(r"^.*</think>|<think>.*$", re.DOTALL)


class TooShortError(InputError):
    """A length that not even the shortest prompt of a task fits into."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question in text.

    messages: a conversation that ends with the user's turn. prefix: the start of the answer, which the model continues.
    evidence: pieces of the messages, each there once, that hold the answer.
    facts: what a record of the sample says besides (a depth, the label of its data).
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...]
    max_new_tokens: int
    prefix: str = ""
    evidence: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens (T,) of which those at the indices `asked` (N,), ascending and above 0, are to be predicted from all before.

    groups: how many of the asked tokens make one answer. places: tokens at which the answers' evidence begins.
    """

    tokens: NDArray[np.int64]
    asked: NDArray[np.int64]
    groups: int = 1
    places: tuple[int, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Predictions:
    """Of each asked token (N,): its log probability in nats, and whether it was the likeliest."""

    log_probs: NDArray[np.float64]
    right: NDArray[np.bool_]


Sample = Prompt | Window


@dataclass(frozen=True, slots=True)
class Task:
    """One row of the table.

    make: (setting, length in tokens, index) -> sample, the same one every time.
    score: (sample, answer text or `Predictions`, style) -> number; of a text without its thoughts.
    measure: what the number is.
    predicts: samples are windows of tokens, not prompts. needs: the name of the file without
    which there are no samples. runs_code: its scorer runs what the model wrote.
    """

    name: str
    make: Callable[["Setting", int, int], Sample]
    score: Callable[[Any, Any, Style], float]
    group: str
    measure: str = "share right"
    higher_is_better: bool = True
    needs: str | None = None
    predicts: bool = False
    runs_code: bool = False
    note: Callable[[Any, Any], Mapping[str, Any]] = lambda sample, answer: {}


@dataclass(frozen=True)
class Setting:
    """What samples are made for: a tokenizer, how prompts are written, a seed, and texts a person gave.

    chat: prompts go through the tokenizer's chat template. files: by what tasks call them ("prose", "squad", ...).
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool = False
    seed: int = 42
    style: Style = "nvidia"
    files: Mapping[str, Path] = field(default_factory=dict)
    # what tasks keep between samples: texts, their tokens
    kept: dict[Any, Any] = field(default_factory=dict)

    def rng(self, *names: object) -> random.Random:
        """Return a generator that depends on the seed and `names` alone."""
        return random.Random("/".join(map(str, (self.seed, *names))))

    def keep(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def file(self, name: str) -> Path:
        if name not in self.files:
            raise InputError(f"no file for {name!r}; expected --file {name}=PATH")
        return self.files[name]

    def read(self, name: str) -> str:
        """Return the text of a file that a person gave.

        Raises:
            InputError: there is none, or it is no text.
        """
        path = self.file(name)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"file {name}={str(path)!r} cannot be read ({error}); expected text in UTF-8") from error
        if not text.strip():
            raise InputError(f"file {name}={str(path)!r} is empty; expected text")
        return text

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @cached_property
    def encoder(self) -> TextEncoder:
        return self._template.encoder if self.chat else TextEncoder(self.tokenizer)

    @cached_property
    def _begin(self) -> list[int]:
        return around(self.tokenizer)[0]

    def text(self, prompt: Prompt) -> str:
        """Return the whole prompt, as the encoder takes it.

        Raises:
            InputError: the chat template refuses the conversation.
        """
        if not self.chat:
            return plain(prompt.messages) + prompt.prefix
        try:
            return self._template.ask(prompt.messages).text + prompt.prefix.lstrip()
        except TemplateRefusal as refusal:
            raise InputError(f"the chat template refuses the prompt: {refusal}") from refusal

    def tokens(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt with one start token, where the tokenizer has one."""
        return self._whole(list(self._encoding(self.text(prompt)).ids))

    def count(self, prompt: Prompt) -> int:
        return len(self.tokens(prompt))

    def sizes(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each of many short texts, nothing put around them."""
        return [len(row.ids) for row in self.encoder.encode_batch(texts)]

    def written(self, prompt: Prompt) -> tuple[list[int], tuple[int, ...]]:
        """Return the ids of a prompt, and the indices of the tokens at which its evidence begins."""
        text = self.text(prompt)
        encoding = self._encoding(text)
        ids = self._whole(list(encoding.ids))
        added = len(ids) - len(encoding.ids)
        starts = [text.find(piece) for piece in prompt.evidence]
        assert all(start >= 0 for start in starts), "the evidence is not in the prompt"
        tokens = [_token_at(encoding, start) for start in starts]
        return ids, tuple(token + added for token in tokens)

    def _encoding(self, text: str) -> Any:
        return self.encoder.encode_batch([text], offsets=True)[0]

    def _whole(self, ids: list[int]) -> list[int]:
        # a chat template may have written the start token itself
        return ids if ids[: len(self._begin)] == self._begin else [*self._begin, *ids]


def plain(messages: Sequence[Message]) -> str:
    """Return a conversation for a model without a chat template: one message as it is, several with names before them."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
    return "\n\n".join([*turns, "Assistant:"])


def ask(content: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": content},)


def prompt_hash(sample: Sample) -> str:
    """Return a short hash of everything that a model is shown."""
    if isinstance(sample, Window):
        content = sample.tokens.tobytes() + sample.asked.tobytes()
    else:
        content = json.dumps([list(map(dict, sample.messages)), sample.prefix], ensure_ascii=False).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def without_thoughts(text: str) -> str:
    """Return the answer alone (see `THOUGHTS_RULE`)."""
    return _THOUGHTS.sub("", text)


def _token_at(encoding: Any, character: int) -> int:
    # spaces before a word may belong to no token
    for at in range(character, character + 8):
        token = encoding.char_to_token(at)
        if token is not None:
            return int(token)
    raise AssertionError("no token at the evidence")
