"""Built libraries on disk: nobody reads half of one, and none runs that this user or root has not put there whole."""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sala.cache import cache_folder, distrust
from sala.errors import DiskError

# links are not followed, and a pipe is not waited for
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
READ = os.O_RDONLY | _NO_LINK | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
LOCK = os.O_RDWR | os.O_CREAT | _NO_LINK


@dataclass(frozen=True, slots=True)
class Built:
    """A library whose checksum was verified: where to load it from, and what it was compiled with."""

    path: str
    compiler: str


class Store:
    """The folder of built libraries. Beside each NAME.so stands NAME.json: its checksum, and what it was compiled with.

    Raises:
        DiskError: the folder cannot be made, or other users could have put files there.
    """

    def __init__(self) -> None:
        self.folder = cache_folder("native")
        # the same, reached through the folder that was looked at, whatever its path leads to by then
        self._pinned = self.folder
        if os.path.isdir("/proc/self/fd"):
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            weakref.finalize(self, os.close, descriptor)
            self._pinned = Path(f"/proc/self/fd/{descriptor}")
            _trust(self.folder, os.fstat(descriptor))

    def names(self, start: str) -> list[str]:
        """Return the names of the libraries that begin so, the newest first."""
        found = self._pinned.glob(f"{start}*.so")
        return [path.stem for path in sorted(found, key=lambda path: path.lstat().st_mtime, reverse=True)]

    def find(self, name: str) -> Built | None:
        """Return a library, None where there is none.

        Raises:
            DiskError: there is one that must not be loaded: damaged, a link, or other users could have written it.
        """
        path = self.folder / f"{name}.so"
        library = self._read(path.name)
        if library is None:
            return None
        record = self._read(f"{name}.json")
        try:
            told = json.loads(record or b"")
            checksum, compiler = told["sha256"], str(told["compiler"])
        except (ValueError, LookupError, TypeError):
            checksum = compiler = ""
        if checksum != hashlib.sha256(library).hexdigest():
            raise DiskError(f"{str(path)!r} is damaged: its checksum is not the one in {name}.json")
        return Built(str(self._pinned / path.name), compiler)

    def add(self, name: str, library: bytes, compiler: str) -> Built:
        """Keep a library: whole and on the disk before it gets its name.

        Raises:
            OSError: it cannot be written.
        """
        record = json.dumps({"sha256": hashlib.sha256(library).hexdigest(), "compiler": compiler})
        # who finds a library finds its record
        self._write(f"{name}.json", record.encode())
        self._write(f"{name}.so", library)
        return Built(str(self._pinned / f"{name}.so"), compiler)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Let one process at a time build a library, where the system has file locks; elsewhere the last to finish wins.

        Raises:
            OSError: the lock cannot be written, or is a link.
        """
        try:
            import fcntl
        except ImportError:
            yield
            return
        with open(os.open(self._pinned / f"{name}.lock", LOCK, 0o600), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read(self, name: str) -> bytes | None:
        path = self.folder / name
        try:
            descriptor = os.open(self._pinned / name, READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DiskError(f"{str(path)!r} cannot be read: {error.strerror}; expected a file, and no link") from error
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise DiskError(f"{str(path)!r} is no file; expected a library, or nothing")
            _trust(path, found)
            return file.read()

    def _write(self, name: str, content: bytes) -> None:
        """Write a file that gets its name once it is whole, and keeps both through a loss of power."""
        with tempfile.TemporaryDirectory(dir=self._pinned) as work:
            path = Path(work, name)
            # for others to read, whatever the umask
            with open(path, "xb", opener=lambda path, flags: os.open(path, flags, 0o644)) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            path.replace(self._pinned / name)
        if os.name == "posix":
            descriptor = os.open(self._pinned, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _trust(path: Path, found: os.stat_result) -> None:
    why_not = distrust(found)
    if why_not:
        raise DiskError(f"{str(path)!r} {why_not}; expected what only you and root can write")
