"""Conversations as text by the tokenizer's own template, and which of its characters the assistant wrote."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sala.errors import InputError

Message = Mapping[str, Any]
ASSISTANT = "assistant"

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the model reads it; `answers` are the spans [start, end) of characters to learn."""

    text: str
    answers: tuple[tuple[int, int], ...]


class TemplateRefusal(Exception):
    """The template does not take this conversation; the message is its own."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations with a tokenizer's chat template and marks what the assistant wrote.

    A template with `{% generation %}` says itself which text that is. For any other, an answer is what a conversation
    grows by from "asked, with the prompt to answer" to "answered", and both must be prefixes of the whole text.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template; right would be a tokenizer of a chat model")

    def render(
        self, messages: Sequence[Message], tools: list[dict[Any, Any]] | None = None, name: str = ""
    ) -> RenderedChat:
        """Return a conversation's text and its answers.

        name: of the conversation, for errors.

        Raises:
            TemplateRefusal: the template refuses the conversation, say for its order of roles.
            InputError: the template writes earlier messages in another way once later ones follow.
        """
        # sources with a schema have null where a message has no such key, and templates print that
        turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
        template = self.tokenizer.get_chat_template(None, tools)
        if _MARKS_ANSWERS.search(template):
            return RenderedChat(*self._write(turns, template, tools, marked=True))
        whole, _ = self._write(turns, template, tools)
        answers = []
        for number, turn in enumerate(turns):
            if turn["role"] == ASSISTANT:
                question, _ = self._write(turns[:number], template, tools, add_generation_prompt=True)
                answer, _ = self._write(turns[: number + 1], template, tools)
                if not (answer.startswith(question) and whole.startswith(answer)):
                    raise InputError(
                        f"the chat template writes message {number + 1} of {name or 'a conversation'} in another way when "
                        "it is asked for or the last one than when more follow, so that it cannot be told from the rest; "
                        "mark answers in the template with {% generation %} and {% endgeneration %}, or give "
                        "conversations whose only answer is the last message"
                    )
                answers.append((len(question), len(answer)))
        return RenderedChat(whole, tuple(answers))

    def _write(
        self, messages: list[dict[str, Any]], template: str, tools: Any, marked: bool = False, **options: Any
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Return the text of messages, and with `marked` the spans inside `{% generation %}`."""
        options |= self.tokenizer.special_tokens_map
        try:
            # typed as one string, it returns one text and one list of spans a conversation
            rendered: Any = render_jinja_template(
                [messages], tools, chat_template=template, return_assistant_tokens_mask=marked, **options
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise TemplateRefusal(str(error)) from error
        texts, spans = rendered
        return texts[0], tuple(spans[0]) if marked else ()


def is_conversation(messages: Any) -> bool:
    """Whether `messages` is a list of messages with a role, at least one."""
    return (
        isinstance(messages, Sequence)
        and not isinstance(messages, str)
        and len(messages) > 0
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages)
    )


def overlaps(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Return which tokens, given by their characters [start, end) in order, share one with any of the spans."""
    edges = list(chain.from_iterable(sorted(spans)))
    inside, at = [], 0
    for start, end in offsets:
        while at < len(edges) and edges[at + 1] <= start:
            at += 2
        inside.append(at < len(edges) and start < edges[at + 1] and edges[at] < end)
    return inside
