"""Answers in OpenAI's forms, whole and in chunks."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sala.engine.answer import TokenLogprob
from sala.engine.events import Done, Event, Piece
from sala.serve.parse import AnswerParser, Parts
from sala.serve.prompts import Prompt, Prompts


@dataclass
class Choice:
    """What has come of one choice so far."""

    index: int
    prompt: Prompt
    parser: AnswerParser | None = None
    parts: Parts = field(default_factory=Parts)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    done: Done | None = None

    def take(self, event: Event) -> Parts:
        """Return what is new and certain."""
        new = Parts()
        if isinstance(event, Piece):
            self.logprobs += event.logprobs
            new = Parts(content=event.text) if self.parser is None else self.parser.add(event.text)
        elif isinstance(event, Done):
            self.done = event
            new = Parts() if self.parser is None else self.parser.finish()
        self.parts.content += new.content
        self.parts.reasoning += new.reasoning
        self.parts.calls += new.calls
        return new

    def take_logprobs(self) -> list[TokenLogprob]:
        taken, self.logprobs = self.logprobs, []
        return taken

    @property
    def finish_reason(self) -> Literal["stop", "length", "tool_calls"]:
        assert self.done is not None
        if self.done.finish == "length":
            return "length"
        return "tool_calls" if self.parts.calls else "stop"


@dataclass(frozen=True, slots=True)
class Reply:
    """What all chunks of an answer have in common."""

    id: str
    kind: Literal["chat.completion", "text_completion"]
    created: int
    model: str

    @classmethod
    def new(cls, kind: Literal["chat.completion", "text_completion"], model: str) -> "Reply":
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        return cls(f"{prefix}-{secrets.token_hex(12)}", kind, int(time.time()), model)

    def body(self, choices: list[dict[str, Any]], *, chunk: bool, **more: Any) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if chunk and self.kind == "chat.completion" else self.kind
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


def usage(choices: Sequence[Choice], per_prompt: int) -> dict[str, Any]:
    """Return the tokens of all choices; a prompt of which there are several counts once."""
    done = [choice.done for choice in choices if choice.done is not None]
    firsts = [choice.done for choice in choices[::per_prompt] if choice.done is not None]
    prompt, new = sum(each.prompt_tokens for each in firsts), sum(each.new_tokens for each in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached for each in firsts)},
    }


def chat_message(choice: Choice) -> dict[str, Any]:
    parts = choice.parts
    message: dict[str, Any] = {"role": "assistant", "content": parts.content}
    if parts.calls:
        message["content"] = parts.content or None
        message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in parts.calls]
    if parts.reasoning:
        message["reasoning_content"] = parts.reasoning
    return message


def chat_delta(new: Parts) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if new.content:
        delta["content"] = new.content
    if new.reasoning:
        delta["reasoning_content"] = new.reasoning
    if new.calls:
        delta["tool_calls"] = new.calls
    return delta


def chat_logprobs(prompts: Prompts, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = prompts.token_text(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}

    return {
        "content": [
            {**entry(each.token, each.logprob), "top_logprobs": [entry(*top) for top in each.top]} for each in logprobs
        ],
        "refusal": None,
    }


def text_logprobs(
    prompts: Prompts, logprobs: Sequence[TokenLogprob | None], first: int | None = None, offset: int = 0
) -> dict[str, Any]:
    """Return the older form. None stands for the first token of a prompt, which nothing predicts: `first` is its id."""
    tokens: list[str] = []
    own: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for each in logprobs:
        text = prompts.token_text(first if each is None and first is not None else each.token if each else 0)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        if each is None:
            own.append(None)
            tops.append(None)
            continue
        own.append(finite(each.logprob))
        top = {prompts.token_text(token): finite(value) for token, value in reversed(each.top)}
        # the token itself is always there
        tops.append({**top, **({text: finite(each.logprob)} if text not in top else {})})
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}


def finite(logprob: float) -> float:
    """JSON has no minus infinity."""
    return max(logprob, -9999.0)
