"""Documents that a server keeps by name: uploaded or saved, read once, asked about many times."""

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sala.engine.answer import AnswerOptions
from sala.engine.engine import Engine
from sala.engine.events import Done, Progress
from sala.engine.sampling import Sampling
from sala.engine.saved import SUFFIX, Reader, load_document, save_document
from sala.errors import InputError
from sala.serve.answers import Answers, Asking
from sala.serve.problem import Problem
from sala.serve.prompts import Prompt, Prompts
from sala.serve.schema import Message

# one name, not a path, and no hidden file
NAME = re.compile(r"[^\x00-\x1f\x7f/\\.][^\x00-\x1f\x7f/\\]{0,119}")
LONGEST_FILE_NAME = 200


@dataclass
class Kept:
    """A document: its text, how many tokens it has, whether they are read, and whether a file has it."""

    name: str
    text: str
    tokens: int = 0
    read: bool = False
    saved: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "characters": len(self.text),
            "tokens": self.tokens,
            "read": self.read,
            "saved": self.saved,
        }


class Documents:
    """Texts by name. With a folder, what was read is kept there, and opened when the server starts.

    reader: who saves and opens, None without a folder. most_bytes: of all texts together.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Prompts,
        folder: Path | None = None,
        reader: Reader | None = None,
        most_bytes: int = 2**30,
    ):
        assert (folder is None) == (reader is None)
        self.engine, self.prompts, self.folder, self.reader = engine, prompts, folder, reader
        self.most_bytes = most_bytes
        self._kept: dict[str, Kept] = {}
        self._lock = threading.Lock()

    def open_folder(self) -> list[str]:
        """Open all saved documents, and return why some were not."""
        if self.folder is None:
            return []
        assert self.reader is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        refused = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                document = load_document(path, self.engine.runner.model, self.reader)
            except InputError as error:
                refused.append(str(error))
                continue
            name = path.name.removesuffix(SUFFIX)
            read = self.engine.adopt(document)
            self._kept[name] = Kept(name, document.text, len(document.ids), read=read, saved=True)
        return refused

    def list(self) -> list[dict[str, Any]]:
        with self._lock:
            return [kept.to_dict() for _, kept in sorted(self._kept.items())]

    def get(self, name: str) -> Kept:
        kept = self._kept.get(check_name(name))
        if kept is None:
            raise Problem(404, f"no document {name!r}; expected one of /documents", "documents")
        return kept

    def texts(self, names: Sequence[str]) -> Sequence[str]:
        return [self.get(name).text for name in names]

    def named(self, names: Sequence[str]) -> dict[str, str]:
        return {name: self.get(name).text for name in names}

    def put(self, name: str, content: bytes) -> Kept:
        """Take a text under a name; another text of that name goes."""
        check_name(name)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Problem(
                400, f"document {name!r} is not UTF-8 (byte {error.start}); expected text in UTF-8"
            ) from error
        if "\0" in text or not text.strip():
            what = "is empty" if not text.strip() else "is a binary file (it holds a zero byte)"
            raise Problem(400, f"document {name!r} {what}; expected text in UTF-8")
        with self._lock:
            others = sum(len(kept.text) for other, kept in self._kept.items() if other != name)
            if others + len(text) > self.most_bytes:
                raise Problem(
                    413, f"{others + len(text):,} characters of documents; expected at most {self.most_bytes:,}"
                )
            kept = self._kept.get(name)
            if kept is None or kept.text != text:
                kept = self._kept[name] = Kept(name, text)
        return kept

    def delete(self, name: str) -> None:
        kept = self.get(name)
        with self._lock:
            del self._kept[name]
        if kept.saved and self.folder is not None:
            self._path(name).unlink(missing_ok=True)

    async def prompt(self, kept: Kept) -> Prompt:
        """Return the document as the start of a question about it."""
        if self.prompts.has_chat:
            return await asyncio.to_thread(
                self.prompts.of_messages, [Message(role="user", content="")], None, None, [kept.text]
            )
        return await asyncio.to_thread(self.prompts.of_text, "", [kept.text])

    async def read(
        self, kept: Kept, *, request_s: float | None, keep_alive_s: float, max_length: int
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Read a document and yield how far it is: tokens, tokens a second, seconds left; at the end the document."""
        prompt = await self.prompt(kept)
        kept.tokens = len(prompt.ids)
        if kept.tokens >= max_length:
            raise Problem(
                400,
                f"document {kept.name!r} has {kept.tokens:,} tokens; expected fewer than {max_length:,}",
                "documents",
            )
        options = AnswerOptions(Sampling(max_new_tokens=1), prompt_only=True)
        started, begun = time.monotonic(), 0
        async with Answers(
            self.engine, [Asking(prompt, options)], request_s=request_s, keep_alive_s=keep_alive_s
        ) as answers:
            async for told in answers.events():
                event = None if told is None else told[1]
                if isinstance(event, Done):
                    begun = event.cached
                elif isinstance(event, Progress):
                    yield _progress(event, time.monotonic() - started)
                else:
                    yield {}
        kept.read = True
        if self.folder is not None:
            await asyncio.to_thread(self._save, kept, prompt)
        yield {"document": kept.to_dict(), "cached_tokens": begun}

    def _save(self, kept: Kept, prompt: Prompt) -> None:
        assert self.reader is not None
        document = self.engine.exported(prompt.ids, kept.text)
        if document is not None:
            save_document(self._path(kept.name), document, self.reader)
            kept.saved = True

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        path = self.folder / f"{name}{SUFFIX}"
        assert path.parent == self.folder
        return path


def check_name(name: str) -> str:
    """Return a document's name; one that is a path, hidden or too long is refused."""
    if NAME.fullmatch(name) is None or len(name.encode()) > LONGEST_FILE_NAME:
        raise Problem(
            400, f"document name {name[:60]!r}; expected 1 to 120 characters, no slash, no leading dot", "name"
        )
    return name


def _progress(event: Progress, elapsed_s: float) -> dict[str, Any]:
    speed = event.read / elapsed_s if elapsed_s else 0.0
    left_s = (event.total - event.read) / speed if speed else None
    return {
        "read": event.read,
        "total": event.total,
        "tokens_per_s": round(speed, 1),
        "seconds_left": None if left_s is None else round(left_s, 1),
    }
