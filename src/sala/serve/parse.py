"""What an answer's text is made of: thoughts, calls of tools, and the rest; also while it still grows."""

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from sala.engine.transcript import overlap

THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"


@dataclass
class Parts:
    """What is certain since the last time: text for the reader, thoughts, and calls as OpenAI writes them."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class AnswerParser:
    """Splits a growing text.

    thinks: the text begins inside thoughts. splits_thoughts: the model writes thoughts between tags.
    tools: names that may be called. A call is `{"name": ..., "arguments" or "parameters": ...}`: the whole answer, or
    between tags. Text that could become a call is held until that is known; what is no call after all is text.
    """

    def __init__(self, tools: Collection[str] = (), *, thinks: bool = False, splits_thoughts: bool = False):
        self.tools = frozenset(tools)
        self.thinking = thinks
        self.splits_thoughts = splits_thoughts or thinks
        self.held = ""
        self.num_calls = 0
        self.seen_text = False

    def add(self, piece: str) -> Parts:
        self.held += piece
        parts = Parts()
        while self._advance(parts, final=False):
            pass
        return parts

    def finish(self) -> Parts:
        parts = Parts()
        while self._advance(parts, final=True):
            pass
        rest, self.held = self.held, ""
        if self.thinking:
            parts.reasoning += rest
        else:
            parts.content += rest
        return parts

    def _advance(self, parts: Parts, final: bool) -> bool:
        """Move what is certain from `held`; True where there may be more."""
        if self.thinking:
            return self._thoughts(parts)
        text = self.held
        start = text.lstrip()
        if self.tools and not self.seen_text and start[:1] in ("{", "["):
            # the whole answer may be a call: known at its end
            return self._bare_calls(parts) if final else False
        marks = ([CALL] if self.tools else []) + ([THINK] if self.splits_thoughts and not self.seen_text else [])
        found = min((mark for mark in marks if mark in text), key=text.index, default=None)
        if found is None:
            keep = max((overlap(text, mark) for mark in marks), default=0)
            if not self.seen_text and not start:
                # spaces before a call are nobody's
                keep = len(text) if marks else keep
            self._say(parts, text[: len(text) - keep])
            self.held = text[len(text) - keep :]
            return False
        at = text.index(found)
        if text[:at].strip():
            self._say(parts, text[:at])
        self.held = text[at:]
        if found == THINK:
            self.held, self.thinking = self.held[len(THINK) :].lstrip("\n"), True
            return True
        return self._tagged_call(parts, final)

    def _say(self, parts: Parts, text: str) -> None:
        parts.content += text
        self.seen_text = self.seen_text or bool(text.strip())

    def _thoughts(self, parts: Parts) -> bool:
        before, mark, after = self.held.partition(THINK_END)
        if mark:
            parts.reasoning += before
            self.held, self.thinking = after.lstrip("\n"), False
            # thoughts are written once
            self.splits_thoughts = False
            return True
        keep = overlap(self.held, THINK_END)
        parts.reasoning += self.held[: len(self.held) - keep]
        self.held = self.held[len(self.held) - keep :]
        return False

    def _tagged_call(self, parts: Parts, final: bool) -> bool:
        end = self.held.find(CALL_END)
        if end < 0 and not final:
            return False
        inside = self.held[len(CALL) : end if end >= 0 else None]
        calls = self._calls(inside)
        if calls is None:
            if end < 0:
                # ends in the middle of a call: text, all of it
                self._say(parts, self.held)
                self.held = ""
                return False
            end += len(CALL_END)
            self._say(parts, self.held[:end])
            self.held = self.held[end:]
            return True
        parts.calls += calls
        self.held = "" if end < 0 else self.held[end + len(CALL_END) :].lstrip("\n")
        return bool(self.held)

    def _bare_calls(self, parts: Parts) -> bool:
        calls = self._calls(self.held)
        if calls is None:
            self._say(parts, self.held)
        else:
            parts.calls += calls
        self.held = ""
        return False

    def _calls(self, text: str) -> list[dict[str, Any]] | None:
        """Return the calls that a JSON text is, None where it is something else."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        items = value if isinstance(value, list) else [value]
        calls = []
        for item in items:
            name = item.get("name") if isinstance(item, dict) else None
            if not isinstance(name, str) or name not in self.tools:
                return None
            arguments = item.get("arguments", item.get("parameters", {}))
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
            calls.append({"index": self.num_calls, **call, "function": {"name": name, "arguments": text}})
            self.num_calls += 1
        return calls or None
