"""Conversations as text by the tokenizer's own template, and which of its characters the assistant wrote."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sala.data.text import TextEncoder, added_tokens
from sala.errors import InputError

Message = Mapping[str, Any]
ASSISTANT = "assistant"

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# added tokens that a text may well have in it: spaces, a word, and a tag such as <think>, which wraps a part of an answer
_WORD = re.compile(r"\s*(\w*|</?\w+>)\s*")
THOUGHTS_END = "</think>"
# stands for a place in a message while a template is rendered; a noncharacter, which no text may hold
_MARK = "\ufdd0"


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the model reads it.

    text: as `TextEncoder` takes it: special tokens are the template's, those that contents spell out are text.
    answers: the spans [start, end) of characters to learn, in order.
    spelled: how many special tokens the contents spell out.
    unmarked: how many of the assistant's messages are in the text but have no span.
    """

    text: str
    answers: tuple[tuple[int, int], ...] = ()
    spelled: int = 0
    unmarked: int = 0


class TemplateRefusal(Exception):
    """The template does not take this conversation; the message is its own."""


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template and marks what the assistant wrote.

    A template with `{% generation %}` says itself which text that is. For any other, an answer is what a conversation
    grows by from "asked, with the prompt to answer" to "answered". Where the template does not write the prompt to answer
    as it asks (a prompt that opens thoughts, say), an answer starts with the message's content.

    An answer that the template writes in another way once more follows has no span: the model never has to write it so.

    parse_special: read special tokens that contents spell out as special tokens.

    Raises:
        InputError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, parse_special: bool = False):
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template; expected a tokenizer of a chat model")
        self.tokenizer: Any = tokenizer
        try:
            self.tokenizer.get_chat_template()
        except ValueError as error:
            raise InputError(f"the tokenizer has several chat templates and no default: {error}") from error
        self.encoder = TextEncoder(tokenizer, parse_special, also=self._turn_marks())

    def render(self, messages: Sequence[Message], tools: list[dict[Any, Any]] | None = None) -> RenderedChat:
        """Return a conversation's text and its answers.

        Raises:
            TemplateRefusal: the template refuses the conversation, say for its order of roles.
        """
        (turns, tools), spelled = self.encoder.hide((_without_nulls(messages), tools))
        template = self.tokenizer.get_chat_template(None, tools)
        if _MARKS_ANSWERS.search(template):
            text, answers = self._write(turns, tools, marked=True)
            return RenderedChat(self.encoder.swap(text), answers, spelled)
        whole, _ = self._write(turns, tools)
        numbers = [number for number, turn in enumerate(turns) if turn["role"] == ASSISTANT]
        found = [self._answer(turns, number, tools, whole) for number in numbers]
        answers = tuple(answer for answer in found if answer is not None)
        return RenderedChat(self.encoder.swap(whole), answers, spelled, len(numbers) - len(answers))

    def ask(
        self, messages: Sequence[Message], tools: list[dict[Any, Any]] | None = None, **options: Any
    ) -> RenderedChat:
        """Return a conversation's text up to where the assistant's answer starts; it has no `answers`.

        tools: descriptions of functions that the assistant may call. options: names that the template knows.

        Raises:
            TemplateRefusal: the template refuses the conversation, or an option.
        """
        (turns, tools), spelled = self.encoder.hide((_without_nulls(messages), tools))
        text, _ = self._write(turns, tools, **{"add_generation_prompt": True, **options})
        return RenderedChat(self.encoder.swap(text), spelled=spelled)

    def _answer(self, turns: list[dict[str, Any]], number: int, tools: Any, whole: str) -> tuple[int, int] | None:
        """Return the span of a message of the assistant in `whole`; None where it stands there in another way."""
        answer, _ = self._write(turns[: number + 1], tools)
        if not whole.startswith(answer):
            return None
        question, _ = self._write(turns[:number], tools, add_generation_prompt=True)
        if answer.startswith(question):
            return len(question), len(answer)
        start = self._start_of_content(turns[: number + 1], tools, answer)
        return None if start is None else (start, len(answer))

    def _start_of_content(self, turns: list[dict[str, Any]], tools: Any, written: str) -> int | None:
        """Return where the last message's content starts in what the template writes; None where it rewrites it."""
        content = turns[-1].get("content")
        if not isinstance(content, str) or not content.strip():
            return None
        # some templates drop thoughts, and many the spaces around a content
        thoughts = content.rfind(THOUGHTS_END) + len(THOUGHTS_END) if THOUGHTS_END in content else 0
        for start in (0, thoughts):
            for at in (start, len(content) - len(content[start:].lstrip())):
                marked, _ = self._write(
                    [*turns[:-1], {**turns[-1], "content": content[:at] + _MARK + content[at:]}], tools
                )
                if _MARK in marked and marked.replace(_MARK, "", 1) == written:
                    return marked.index(_MARK)
        return None

    def _turn_marks(self) -> set[str]:
        """Return the added tokens that the template writes between messages; some tokenizers do not call them special."""
        turns = [{"role": role, "content": "a"} for role in ("user", ASSISTANT, "user")]
        try:
            text, _ = self._write(turns, None)
        except TemplateRefusal:
            return set()
        tokens = [token.content for token in added_tokens(self.tokenizer)]
        return {token for token in tokens if token in text and not _WORD.fullmatch(token)}

    def _write(
        self, messages: list[dict[str, Any]], tools: Any, marked: bool = False, **options: Any
    ) -> tuple[str, tuple[tuple[int, int], ...]]:
        """Return the text of messages, and with `marked` the spans inside `{% generation %}`."""
        options |= self.tokenizer.special_tokens_map
        template = self.tokenizer.get_chat_template(None, tools)
        try:
            # typed as one string, it returns one text and one list of spans a conversation
            rendered: Any = render_jinja_template(
                [messages], tools, chat_template=template, return_assistant_tokens_mask=marked, **options
            )
        except Exception as error:  # of any kind: a template is a program that came with the model
            raise TemplateRefusal(str(error) or type(error).__name__) from error
        texts, spans = rendered
        return texts[0], tuple(spans[0]) if marked else ()


def _without_nulls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    # sources with a schema have null where a message has no such key, and templates print that
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


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
