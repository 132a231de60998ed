"""Every error a user can cause: one line with what was wrong, the value, and what would be right."""

import difflib
import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

# how Rust's libraries (safetensors, tokenizers) end what they say of an error of the system
_OF_RUST = re.compile(r"\(os error (\d+)\)$")

INTERRUPTED = "sala: interrupted"


@contextmanager
def loading() -> Iterator[None]:
    """Let Ctrl-C say one line while modules are imported, which takes seconds: no `main` is there yet to catch it."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        before, ours = sys.excepthook, interrupt

        def say(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
            sys.excepthook = before
            if error is ours:
                print(INTERRUPTED, file=sys.stderr)
            else:
                before(kind, error, traceback)

        sys.excepthook = say
        raise


class SalaError(Exception):
    """Base of all errors a user can cause; the command line prints it and exits with `exit_code`."""

    exit_code = 2


class ConfigError(SalaError):
    """A model configuration that no network can be built from."""


class CheckpointError(SalaError):
    """A checkpoint folder that is missing, incomplete or of another shape than its configuration says."""


class RecipeError(SalaError):
    """A recipe that cannot be run as it is written."""


class InputError(SalaError):
    """Text, files, options or tensors that a verb cannot work on."""


class TokenizerError(InputError):
    """A tokenizer that is not the one of the data or of the model."""


class DiskError(SalaError):
    """A file or folder that the system does not let us write or read: a full disk, a quota, missing rights."""


class BackendError(SalaError):
    """A backend asked for by name that cannot run here."""


class MemoryLimitError(SalaError):
    """Work that would not fit into the machine's memory."""


def shortened(text: str, size: int = 40) -> str:
    """Return `text`, of a long one its start: an error is one line whatever was given."""
    return text if len(text) <= size else f"{text[:size]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known name, or `""` when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an error of the system about `path`, a folder on its way or a file that stands in for it a DiskError about it."""
    try:
        yield
    except SalaError:
        raise
    except Exception as error:
        found = _OF_RUST.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        about = getattr(error, "filename", None)
        if number is None or (about is not None and not _on_the_way(Path(about), path.parent)):
            raise
        if number == errno.EEXIST and about is not None and Path(about) in path.parents:
            # a file, where a folder is to be made
            number = errno.ENOTDIR
        raise DiskError(f"{str(path)!r} cannot be written: {os.strerror(number)}") from error


def _on_the_way(about: Path, folder: Path) -> bool:
    return about.is_relative_to(folder) or folder.is_relative_to(about)


def require_writable(path: Path) -> None:
    """Raise DiskError unless a file can be written at `path`: asked before the hours of work whose result it will hold.

    Its folder is made where there is none.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
