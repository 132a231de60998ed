"""What a model is asked: documents from files, folders, globs and standard input, and the prompt as token ids."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from transformers import PreTrainedTokenizerBase

from sala.data import Document, concatenate
from sala.errors import InputError

STDIN = "-"
WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts in the order they are read, and how many files of folders and globs were passed over."""

    texts: tuple[Document, ...]
    skipped: int

    @property
    def text(self) -> str:
        """One text as it is; several as one, each under a comment line with its name."""
        return self.texts[0].text if len(self.texts) == 1 else concatenate(self.texts)


class NotTextError(Exception):
    """Bytes that are no text; the message says why."""


def read_documents(sources: Sequence[str], stdin: BinaryIO) -> Documents:
    """Read files, folders (with all below them), globs and "-" (standard input), in the order given.

    Files of a folder or a glob come sorted by path; there, binary, empty and hidden files are passed over and counted.
    A file asked for by name has to be text, UTF-8 with or without a byte order mark. No file is read twice.

    Raises:
        InputError: a source is missing, matches nothing, is empty, or is not text.
    """
    texts: list[Document] = []
    seen: set[Path] = set()
    skipped = 0
    for source in sources:
        if source == STDIN:
            texts.append(_named("standard input", stdin.read()))
            continue
        path = Path(source).expanduser()
        if path.is_file():
            if path.resolve() not in seen:
                seen.add(path.resolve())
                texts.append(_named(source, _bytes(path)))
            continue
        found, passed_over = _search(path, source, seen)
        texts += found
        skipped += passed_over
    return Documents(tuple(texts), skipped)


def join(document: str, prompt: str) -> str:
    """Return the document, a blank line and the prompt; one of them alone as it is.

    Raises:
        InputError: there is neither.
    """
    if not document and not prompt:
        raise InputError("nothing to read: give --file, --prompt, or both")
    if not document or not prompt:
        return document or prompt
    return document.rstrip("\n") + "\n\n" + prompt


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, vocab_size: int, chat: bool = False) -> list[int]:
    """Return the token ids of `text`, with the start token that the tokenizer is configured to put first, once.

    chat: write the text as a user's message in the tokenizer's chat template, ready for the answer.

    Raises:
        InputError: there is no chat template, no token at all, or an id that the model has no embedding for.
    """
    if chat:
        if not tokenizer.chat_template:
            raise InputError("--chat needs a chat template, and this checkpoint's tokenizer has none; leave --chat out")
        message = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    begin = tokenizer.bos_token
    # a template that writes the start token itself would otherwise get a second one
    written = chat and begin is not None and text.startswith(begin)
    ids: list[int] = tokenizer(text, add_special_tokens=not written, verbose=False)["input_ids"]
    if getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id not in ids[:1]:
        # asked for in tokenizer_config.json but left out by tokenizer.json: without it a model's numbers are others
        assert tokenizer.bos_token_id is not None
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise InputError("the prompt has no tokens; right would be at least one")
    if max(ids) >= vocab_size:
        raise InputError(
            f"the tokenizer gave id {max(ids)}, the model has embeddings for 0 to {vocab_size - 1}; "
            "right would be the tokenizer that the model was trained with"
        )
    return ids


def _search(path: Path, source: str, seen: set[Path]) -> tuple[list[Document], int]:
    if path.is_dir():
        candidates: Iterator[Path] | list[Path] = sorted(item for item in path.rglob("*") if item.is_file())
        hidden = [item for item in candidates if _is_hidden(item.relative_to(path))]
    elif WILDCARDS & set(source):
        candidates = sorted(Path(item) for item in glob.glob(str(path), recursive=True) if Path(item).is_file())
        hidden = []  # a glob passes hidden names over itself, unless it names them
    else:
        raise InputError(f"no file or folder {source!r}; right would be a path, a glob such as 'src/**/*.py', or - ")
    passed_over = set(hidden)
    texts = []
    for item in candidates:
        if item in passed_over or item.resolve() in seen:
            continue
        seen.add(item.resolve())
        try:
            texts.append(Document(str(item), _text(_bytes(item))))
        except NotTextError:
            passed_over.add(item)
    if not texts:
        raise InputError(f"no text in {source!r} ({len(passed_over)} files passed over); right would be UTF-8 files")
    return texts, len(passed_over)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}") from error


def _named(name: str, content: bytes) -> Document:
    try:
        return Document(name, _text(content))
    except NotTextError as error:
        raise InputError(f"{name!r} {error}; right would be text in UTF-8") from error


def _text(content: bytes) -> str:
    if not content.strip():
        raise NotTextError("is empty")
    if b"\0" in content:
        raise NotTextError("is a binary file (it holds a zero byte)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError(f"is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x})") from error
