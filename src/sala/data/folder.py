"""What a path names: a file, a folder of documents, or a pipe."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from sala.errors import InputError, shortened

Kind = Literal["file", "folder", "pipe"]


@dataclass(frozen=True, slots=True)
class Below:
    """What is below a folder: files to read, sorted by path, and what is not read.

    hidden: how many files have a name, or are in a folder with a name, that begins with a dot.
    links: how many links lead out of the folder, or to a folder; none of them is followed.
    """

    files: tuple[Path, ...]
    hidden: int = 0
    links: int = 0


def source_path(source: str | Path) -> Path:
    """Return the path that a person wrote, with `~` as their home; as it is where there is no such home.

    Raises:
        InputError: it is empty, as of a variable that is not set; `Path("")` is the current folder.
    """
    if not str(source):
        raise InputError("a source is ''; expected a file, a folder or a pipe")
    # not Path's own, which raises for a home of nobody
    return Path(os.path.expanduser(source))


def kind_of(path: Path) -> Kind | None:
    """Return what `path` names; None when there is nothing. A terminal is a pipe: both are read once, to their end.

    Raises:
        InputError: the system does not let us look, or it is a device, which may never end.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        refuse(path, error)
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and _is_terminal(path)):
        return "pipe"
    raise InputError(f"{str(path)!r} is a device or a socket; expected a file, a folder or a pipe")


def files_below(folder: Path) -> Below:
    """Return the files below `folder`, however deep. A link to a file that is read anyway is not a second one.

    Raises:
        InputError: a folder cannot be read.
    """

    def refused(error: OSError) -> NoReturn:
        refuse(Path(error.filename), error)

    found = [Path(at, name) for at, folders, files in os.walk(folder, onerror=refused) for name in folders + files]
    hidden = [path for path in found if is_hidden(path.relative_to(folder))]
    below = documents(folder, set(found).difference(hidden))
    return Below(below.files, sum(map(os.path.isfile, hidden)), below.links)


def documents(folder: Path, paths: set[Path]) -> Below:
    """Return which of `paths`, all of them below `folder`, are files to read.

    Raises:
        InputError: the system does not let us look at one of them.
    """
    try:
        links = {path for path in paths if path.is_symlink()}
        left = {path for path in links if path.is_dir() or (path.is_file() and not _is_inside(path, folder))}
        files = [path for path in paths - left if path.is_file()]
    except OSError as error:
        refuse(folder if error.filename is None else Path(error.filename), error)
    here = {os.path.realpath(path) for path in files if path not in links}
    read = [path for path in files if path not in links or os.path.realpath(path) not in here]
    return Below(tuple(sorted(read)), links=len(left))


def is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def shown(path: Path) -> str:
    """Return a path as text for a person or a model: bytes that are no UTF-8 as the replacement character."""
    return os.fsencode(path).decode("utf-8", errors="replace")


def refuse(path: Path, error: OSError | ValueError) -> NoReturn:
    """Raise InputError for what the system said when `path` was read."""
    raise InputError(
        f"{shortened(str(path), 200)!r} cannot be read: {getattr(error, 'strerror', None) or error}"
    ) from error


def _is_inside(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _is_terminal(path: Path) -> bool:
    try:
        # a terminal that is opened must not become this process's own
        descriptor = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        refuse(path, error)
    try:
        return os.isatty(descriptor)
    finally:
        os.close(descriptor)
