"""What a model is asked: documents from files, folders, globs and standard input, and the prompt as token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from transformers import PreTrainedTokenizerBase

from sala.data import Document, concatenate
from sala.data.chat import ChatTemplate, TemplateRefusal
from sala.data.folder import Below, documents, files_below, is_hidden, kind_of, refuse, shown, source_path
from sala.data.text import TextEncoder, around
from sala.errors import InputError

STDIN = "-"
WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Documents:
    """Texts in the order they are read, and how many files and links of folders and globs were passed over."""

    texts: tuple[Document, ...]
    skipped: int = 0
    links: int = 0

    @property
    def text(self) -> str:
        """One text as it is; several as one, each under a comment line with its name."""
        return self.texts[0].text if len(self.texts) == 1 else concatenate(self.texts)


class NotTextError(Exception):
    """Bytes that are no text; the message says why."""


def read_documents(sources: Sequence[str], stdin: BinaryIO) -> Documents:
    """Read files, pipes, folders (with all below them), globs and "-" (standard input), in the order given.

    Files of a folder or a glob come sorted by path; there, binary, empty and hidden files are passed over and counted, and
    so are links that lead out of the folder. A source asked for by name has to be text, UTF-8 with or without a byte order
    mark; a link asked for by name is followed. No file is read twice.

    Raises:
        InputError: a source is missing, matches nothing, cannot be read, is empty, or is not text.
    """
    texts: list[Document] = []
    seen: set[Path] = set()
    skipped = links = 0
    for source in sources:
        if source == STDIN:
            texts.append(_named("standard input", stdin.read()))
            continue
        path = source_path(source)
        kind = kind_of(path)
        if kind in ("file", "pipe"):
            if path.resolve() not in seen:
                seen.add(path.resolve())
                texts.append(_named(shown(path), _bytes(path)))
            continue
        below = files_below(path) if kind == "folder" else _matches(path, source)
        found = _texts(below, seen)
        passed_over = below.hidden + found.skipped
        if not found.texts:
            raise InputError(
                f"no text in {source!r} ({passed_over:,} files and {below.links:,} links passed over); expected UTF-8 files"
            )
        texts += found.texts
        skipped += passed_over
        links += below.links
    return Documents(tuple(texts), skipped, links)


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


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    vocab_size: int,
    chat: bool = False,
    *,
    parse_special: bool = False,
    on_spelled: Callable[[int], None] = lambda count: None,
) -> list[int]:
    """Return the token ids of `text`, with the start token that the tokenizer is configured to put first, once.

    chat: write the text as a user's message in the tokenizer's chat template, ready for the answer.
    parse_special: read special tokens that the text spells out as special tokens; as text otherwise.
    on_spelled: called with how many of them were read as text, if there were any.

    Raises:
        InputError: there is no chat template, or it refuses the text; the text is no Unicode; there is no token at all, or
            an id that the model has no embedding for.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"character {error.start + 1:,} of the prompt is no whole character; expected UTF-8"
        ) from error
    if chat:
        template = ChatTemplate(tokenizer, parse_special)
        encoder = template.encoder
        try:
            question = template.ask([{"role": "user", "content": text}])
        except TemplateRefusal as refusal:
            raise InputError(f"the chat template refuses the prompt: {refusal}") from refusal
        text, spelled = question.text, question.spelled
    else:
        encoder = TextEncoder(tokenizer, parse_special)
        spelled = encoder.count(text)
    if spelled:
        on_spelled(spelled)
    ids = encoder.encode(text)
    begin, end = around(tokenizer)
    if ids[: len(begin)] == begin:
        # the chat template wrote the start token itself
        begin = []
    ids = [*begin, *ids, *([] if chat else end)]
    if not ids:
        raise InputError("the prompt has no tokens; expected at least one")
    if max(ids) >= vocab_size:
        raise InputError(
            f"the tokenizer gave id {max(ids)}, the model has embeddings for 0 to {vocab_size - 1}; "
            "expected the tokenizer that the model was trained with"
        )
    return ids


def _matches(path: Path, source: str) -> Below:
    """Return the files that a glob matches; those with hidden names only where the glob names them."""
    if not WILDCARDS & set(source):
        raise InputError(f"no file or folder {source!r}; expected a path, a glob such as 'src/**/*.py', or -")
    first = next((i for i, part in enumerate(path.parts) if WILDCARDS & set(part)), 0)
    root, parts = Path(*path.parts[:first]), path.parts[first:]
    # of itself `**` matches folders alone
    pattern = str(Path(*parts, "*") if parts[-1] == "**" else Path(*parts))
    try:
        found = set(root.glob(pattern))
    except (OSError, ValueError) as error:
        refuse(path, error)
    if not is_hidden(Path(*parts)):
        found = {item for item in found if not is_hidden(item.relative_to(root))}
    return documents(root, found)


def _texts(below: Below, seen: set[Path]) -> Documents:
    """Read the files that are not in `seen`, which grows."""
    texts, skipped = [], 0
    for path in below.files:
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        try:
            texts.append(Document(shown(path), _text(_bytes(path))))
        except NotTextError:
            skipped += 1
    return Documents(tuple(texts), skipped)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        refuse(path, error)


def _named(name: str, content: bytes) -> Document:
    try:
        return Document(name, _text(content))
    except NotTextError as error:
        raise InputError(f"{name!r} {error}; expected text in UTF-8") from error


def _text(content: bytes) -> str:
    if b"\0" in content:
        raise NotTextError("is a binary file (it holds a zero byte)")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotTextError(f"is not UTF-8 (byte {error.start} is 0x{content[error.start]:02x})") from error
    if not text.strip():
        raise NotTextError("is empty")
    return text
