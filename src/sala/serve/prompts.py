"""From what clients send to token ids: chat templates, tools, documents, and where messages end."""

import json
import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sala.data.chat import ChatTemplate, RenderedChat, TemplateRefusal
from sala.data.text import TextEncoder, around
from sala.engine.prompt import encode_prompt, join
from sala.serve.problem import Problem
from sala.serve.schema import Message, Tool

# states are kept at the ends of the first message and of so many last ones
LAST_MESSAGES = 4
# of transformers' own call, not of a template
RESERVED = frozenset(
    {"chat_template", "conversations", "tools", "documents", "add_generation_prompt", "continue_final_message"}
    | {"return_assistant_tokens_mask"}
)
# below so many characters a prompt has no page to keep
SHORT_TEXT = 256


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the text they are made from, and lengths at which messages end.

    begins: how many ids come before those of the text. thinks: the template has opened thoughts.
    """

    ids: tuple[int, ...]
    text: str = ""
    begins: int = 0
    ends: tuple[int, ...] = ()
    thinks: bool = False


class Prompts:
    """Encodes for one tokenizer; may be called by several threads, one at a time works."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, chat_template: str | None = None):
        self.tokenizer: Any = tokenizer
        self.vocab_size = vocab_size
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        self.has_chat = bool(getattr(tokenizer, "chat_template", None))
        self._template = ChatTemplate(tokenizer) if self.has_chat else None
        self._encoder = TextEncoder(tokenizer)
        self._lock = threading.Lock()

    def of_text(self, text: str, documents: Sequence[str] = ()) -> Prompt:
        """Return a prompt as `sala generate` reads it."""
        for document in reversed(documents):
            text = join(document, text)
        with self._lock:
            ids = encode_prompt(self.tokenizer, text, self.vocab_size)
            begins, _ = around(self.tokenizer)
        return Prompt(tuple(ids), text, len(begins))

    def of_ids(self, ids: Sequence[int]) -> Prompt:
        if not ids:
            raise Problem(400, "the prompt has no tokens; expected at least one", "prompt")
        if max(ids) >= self.vocab_size:
            raise Problem(400, f"the prompt holds token id {max(ids)}; expected 0 to {self.vocab_size - 1}", "prompt")
        return Prompt(tuple(ids))

    def of_messages(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        options: dict[str, Any] | None = None,
        documents: Sequence[str] = (),
    ) -> Prompt:
        """Return a conversation in the chat template, ready for the assistant's answer."""
        if self._template is None:
            raise Problem(
                400,
                "this model has no chat template; expected /v1/completions, or a server started with --chat-template",
                "messages",
            )
        turns = [_turn(message) for message in messages]
        for document in reversed(documents):
            turns = _with_document(turns, document)
        described = [tool.model_dump(exclude_none=True) for tool in tools or ()] or None
        with self._lock:
            rendered = self._render(turns, described, options or {})
            ids = self._template.encoder.encode(rendered.text)
            begins, _ = around(self.tokenizer)
            if ids[: len(begins)] == begins:
                begins = []
            ends = self._ends(turns, described, options or {}, rendered.text, ids)
        whole = self.of_ids([*begins, *ids]).ids
        thinks = rendered.text.rstrip().endswith("<think>")
        return Prompt(whole, rendered.text, len(begins), tuple(len(begins) + end for end in ends), thinks)

    def offsets(self, prompt: Prompt) -> list[tuple[int, int]] | None:
        """Return the characters [start, end) of the text for each id, None where they are not known."""
        encoder = self._encoder if self._template is None else self._template.encoder
        with self._lock:
            encoding = encoder.encode_batch([prompt.text], offsets=True)[0]
        if tuple(encoding.ids) != prompt.ids[prompt.begins : prompt.begins + len(encoding.ids)]:
            return None
        return [*[(0, 0)] * prompt.begins, *encoding.offsets]

    def token_text(self, token: int) -> str:
        with self._lock:
            return str(self.tokenizer.decode([token]))

    def text(self, ids: Sequence[int]) -> str:
        with self._lock:
            return str(self.tokenizer.decode(list(ids)))

    def _render(self, turns: list[dict[str, Any]], tools: Any, options: dict[str, Any]) -> RenderedChat:
        assert self._template is not None
        if taken := sorted(RESERVED & options.keys()):
            raise Problem(
                400, f"chat_template_kwargs names {taken[0]!r}; expected names of the template", "chat_template_kwargs"
            )
        try:
            return self._template.ask(turns, tools, **options)
        except TemplateRefusal as refusal:
            raise Problem(400, f"the chat template refuses the messages: {refusal}", "messages") from refusal

    def _ends(
        self, turns: list[dict[str, Any]], tools: Any, options: dict[str, Any], text: str, ids: list[int]
    ) -> list[int]:
        """Return how many of `ids` lie before the ends of the first and of the last messages."""
        assert self._template is not None
        if len(turns) < 2 or len(text) < SHORT_TEXT:
            return []
        places = []
        for count in {1, *range(max(1, len(turns) - LAST_MESSAGES), len(turns))}:
            try:
                before = self._template.ask(turns[:count], tools, **{**options, "add_generation_prompt": False}).text
            except TemplateRefusal:
                # no conversation by itself
                continue
            if text.startswith(before):
                places.append(len(before))
        encoding = self._template.encoder.encode_batch([text], offsets=True)[0]
        if list(encoding.ids) != ids:
            return []
        starts = [start for start, _ in encoding.offsets]
        return [bisect_right(starts, place - 1) for place in sorted(places)]


def _turn(message: Message) -> dict[str, Any]:
    """Return a message as templates expect it."""
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text(),
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content,
    }
    if message.tool_calls:
        turn["tool_calls"] = [
            _call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls
        ]
    return {name: value for name, value in turn.items() if value is not None}


def _call(id: str, name: str, arguments: str) -> dict[str, Any]:
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        raise Problem(
            400, f"the arguments of a call of {name!r} are not JSON: {error}; expected JSON", "messages"
        ) from error
    return {"id": id, "type": "function", "function": {"name": name, "arguments": parsed}}


def _with_document(turns: list[dict[str, Any]], document: str) -> list[dict[str, Any]]:
    """Put a document before what the user says first."""
    index = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if index is None:
        raise Problem(400, "documents without a message of the user; expected one", "documents")
    changed = {**turns[index], "content": join(document, turns[index]["content"])}
    return [*turns[:index], changed, *turns[index + 1 :]]
