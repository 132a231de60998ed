"""Tokenised documents on disk: shards of tokens, one index of where documents end, one header with checksums."""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from sala.errors import InputError, TokenizerError
from sala.model.checkpoint import output_folder

FORMAT = "sala-tokens-1"
HEADER, INDEX, LOCK = "header.json", "documents.bin", "lock"
# 1 GiB of tokens
SHARD_TOKENS = 2**28

TOKEN, END, LOSS = np.dtype("<u4"), np.dtype("<i8"), np.dtype("u1")

Ints = NDArray[np.int64]

# what tokenizers differ in: spaces, digits, case, accents in both normal forms, scripts, controls, code
_PROBE = (
    " a  b\tc\r\n\n\nThe THE the; don't can\u2019t 1 12 123 1234567 3.14 \u00bd \u00e9 e\u0301 \u00fc \ufb01 \u2460 "
    "\u4f60\u597d\u3002 \u3053\u3093 \ud55c\uad6d \u0440\u0443\u0441 \u0639\u0631 \U0001f600\U0001f468\u200d\U0001f469 "
    "\u00a0\u200b\u3000 <s> </s> [INST] <|x|> def f(x):\n    return x  # y\n\t\tz\n"
)
_PROBE_PIECES = 50_000


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what a tokenizer does: its vocabulary, and the ids of a probe made of odd text and its pieces.

    Not of its files, which later versions of the libraries write in another way.
    """
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    probe = _PROBE + "\n".join(piece for piece, _ in vocabulary[:_PROBE_PIECES])
    ids = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
    return hashlib.sha256(json.dumps([vocabulary, ids]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Shard:
    """One pair of files: tokens (uint32) and, for chat, which of them are targets (uint8, one a token)."""

    file: str
    tokens: int
    documents: int
    loss: str | None


class _HashedFile:
    """A file that is written once, with the checksum of what went into it."""

    def __init__(self, path: Path):
        self.name = path.name
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._size += len(content)

    def close(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}

    def abandon(self) -> None:
        self._file.close()


class ShardWriter:
    """Writes documents, one after the other; made by `shard_writer`.

    A document lies in one shard: a shard ends after the document that fills it.
    """

    def __init__(self, folder: Path, with_loss: bool, shard_tokens: int):
        self.num_documents = self.num_tokens = 0
        self._folder, self._with_loss, self._shard_tokens = folder, with_loss, shard_tokens
        self._files: dict[str, dict[str, Any]] = {}
        self._shards: list[Shard] = []
        self._open: list[_HashedFile] = []
        self._index = _HashedFile(folder / INDEX)
        self._first_document = self._first_token = 0

    def add(self, ids: Ints, loss: NDArray[np.bool_] | None = None) -> None:
        """Append a document: ids (n,), n > 0, and for a set with a loss mask which of them are targets (n,)."""
        assert len(ids) > 0
        assert (loss is not None) == self._with_loss
        if not self._open:
            number = f"{len(self._shards):05d}"
            self._open = [_HashedFile(self._folder / f"tokens-{number}.bin")]
            if self._with_loss:
                self._open.append(_HashedFile(self._folder / f"loss-{number}.bin"))
        self._open[0].write(np.asarray(ids).astype(TOKEN).tobytes())
        if loss is not None:
            self._open[1].write(np.asarray(loss).astype(LOSS).tobytes())
        self.num_tokens += len(ids)
        self.num_documents += 1
        self._index.write(np.array(self.num_tokens, END).tobytes())
        if self.num_tokens - self._first_token >= self._shard_tokens:
            self._end_shard()

    def finish(self, header: Mapping[str, Any]) -> None:
        """Write the header, with `header` in it: the folder is complete."""
        if self._open:
            self._end_shard()
        self._files[self._index.name] = self._index.close()
        whole = {
            "format": FORMAT,
            **header,
            "documents": self.num_documents,
            "tokens": self.num_tokens,
            "shards": [dataclasses.asdict(shard) for shard in self._shards],
            "files": self._files,
        }
        (self._folder / HEADER).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

    def _end_shard(self) -> None:
        names = [file.name for file in self._open]
        self._files |= {file.name: file.close() for file in self._open}
        self._open = []
        tokens, documents = self.num_tokens - self._first_token, self.num_documents - self._first_document
        self._shards.append(Shard(names[0], tokens, documents, names[1] if self._with_loss else None))
        self._first_token, self._first_document = self.num_tokens, self.num_documents

    def abandon(self) -> None:
        """Close what is open."""
        for file in (*self._open, self._index):
            file.abandon()


@contextlib.contextmanager
def shard_writer(
    folder: str | Path, *, with_loss: bool = False, shard_tokens: int = SHARD_TOKENS
) -> Iterator[ShardWriter]:
    """Give a writer whose `finish` has to be called; `folder` gets its name when the block ends without an error.

    Until then everything is in a hidden folder beside it, which an error removes, and after a kill the next run.

    Raises:
        InputError: `folder` exists already or cannot be written.
    """
    target = Path(os.path.expanduser(folder))
    _remove_leftovers(target)
    with output_folder(target) as working:
        lock = working / LOCK
        with lock.open("wb") as file:
            # says to other runs that this folder is in use; the system lets go of it however the process ends
            fcntl.flock(file, fcntl.LOCK_EX)
            writer = ShardWriter(working, with_loss, shard_tokens)
            try:
                yield writer
            finally:
                writer.abandon()
            lock.unlink()


def _remove_leftovers(target: Path) -> None:
    """Remove what runs that were killed left of `target`; a run that is still at work holds its lock."""
    for lock in target.parent.glob(f".{glob.escape(target.name)}.*/{LOCK}"):
        with lock.open("rb") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


class Shards:
    """A folder of tokenised documents, memory-mapped: any number of processes may read it at once.

    tokenizer: refused when it is not the one that the shards were made with.

    Raises:
        InputError: no such folder, or a file missing or of the wrong size.
        TokenizerError: another tokenizer.
    """

    def __init__(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None):
        self.folder = Path(os.path.expanduser(folder))
        self.header = _read_header(self.folder)
        self.num_documents: int = self.header["documents"]
        self.num_tokens: int = self.header["tokens"]
        self.shards = tuple(Shard(**shard) for shard in self.header["shards"])
        for name, facts in self.header["files"].items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != facts["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise InputError(f"shard {path} {found}; expected {facts['bytes']} bytes: tokenise again")
        if tokenizer is not None and (given := tokenizer_hash(tokenizer)) != self.header["tokenizer"]["sha256"]:
            made = self.header["tokenizer"]
            raise TokenizerError(
                f"{self.folder} was tokenised with another tokenizer (hash {made['sha256'][:12]}, {made['size']} pieces) "
                f"than this one (hash {given[:12]}, {len(tokenizer)} pieces); expected the same, or shards made with this one"
            )
        self._ends = np.memmap(self.folder / INDEX, END, "r")
        self._first_documents = list(accumulate((s.documents for s in self.shards), initial=0))
        self._first_tokens = list(accumulate((s.tokens for s in self.shards), initial=0))
        self._maps: dict[str, NDArray[Any]] = {}

    @property
    def sha256(self) -> str:
        """A hash of all tokens, masks and document ends."""
        checksums = json.dumps({name: facts["sha256"] for name, facts in self.header["files"].items()}, sort_keys=True)
        return hashlib.sha256(checksums.encode()).hexdigest()

    @property
    def pad(self) -> int:
        """The token that fills windows; nothing is learnt from it."""
        return self.header["pad"]

    def verify(self) -> None:
        """Read every byte and compare checksums; raise InputError that names the first file that differs."""
        for name, facts in self.header["files"].items():
            with (self.folder / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != facts["sha256"]:
                raise InputError(f"shard {self.folder / name} is corrupt (its checksum differs): tokenise again")

    def lengths(self, documents: Ints) -> Ints:
        """Return the tokens of each document (n,) of `documents` (n,)."""
        ends = self._ends[documents]
        return ends - np.where(documents > 0, self._ends[np.maximum(documents - 1, 0)], 0)

    def chunks_of_lengths(self) -> Iterator[Ints]:
        """Yield the lengths of all documents in order, a million at a time."""
        for start in range(0, self.num_documents, 2**20):
            yield self.lengths(np.arange(start, min(start + 2**20, self.num_documents)))

    def read(self, document: int, start: int = 0, end: int | None = None) -> tuple[NDArray, NDArray[np.bool_] | None]:
        """Return tokens `start` to `end` of a document, uint32 (n,), and which are targets (n,), None when all are."""
        if not 0 <= document < self.num_documents:
            raise InputError(f"document {document} is not in {self.folder}; it holds 0 to {self.num_documents - 1}")
        number = bisect_right(self._first_documents, document) - 1
        shard = self.shards[number]
        first = int(self._ends[document - 1]) if document else 0
        last = int(self._ends[document]) if end is None else first + end
        part = slice(first + start - self._first_tokens[number], last - self._first_tokens[number])
        loss = None if shard.loss is None else self._map(shard.loss, LOSS)[part].astype(bool)
        return self._map(shard.file, TOKEN)[part], loss

    def _map(self, name: str, dtype: np.dtype) -> NDArray[Any]:
        if name not in self._maps:
            # a plain view: slices of np.memmap are slow to make
            self._maps[name] = np.memmap(self.folder / name, dtype, "r").view(np.ndarray)
        return self._maps[name]


def _read_header(folder: Path) -> Mapping[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} is no folder of shards: {HEADER} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT!r}; expected a folder that `sala data` wrote")
    return header
