"""The folder that keeps what is made or fetched once on this machine: compiled kernels, models."""

import functools
import logging
import os
import stat
import tempfile
from pathlib import Path

from sala.errors import DiskError

logger = logging.getLogger("sala")

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_folder(kind: str) -> Path:
    """Return the folder for things of a kind, made where there is none; only this user and root can write to it.

    The cache is $SALA_CACHE/sala, else $XDG_CACHE_HOME/sala, else ~/.cache/sala. Where there is no home to write to it
    lies in the system's folder for temporary files, and a line says so. Links in it are not followed.

    Raises:
        DiskError: it cannot be made, or other users could have put files there.
    """
    cache = _cache()
    for folder in (cache, cache / kind):
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            why_not = distrust(folder.lstat())
        except OSError as error:
            raise DiskError(
                f"the cache {str(folder)!r} cannot be made: {error.strerror}; set SALA_CACHE to a folder that can be written"
            ) from error
        if why_not:
            raise DiskError(
                f"the cache {str(folder)!r} {why_not}; expected a folder that only you can write to: "
                "change its owner or mode, or set SALA_CACHE to another"
            )
    return cache / kind


def distrust(found: os.stat_result) -> str | None:
    """Return why users other than this one and root could have written a file or folder, None where they could not."""
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    # elsewhere owners and modes say nothing
    if os.name == "posix" and found.st_uid not in (0, os.geteuid()):
        return f"belongs to another user (uid {found.st_uid})"
    if os.name == "posix" and found.st_mode & OTHERS_WRITE:
        return f"can be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _cache() -> Path:
    # a variable that is empty is one that is not set
    if asked := os.environ.get("SALA_CACHE"):
        return Path(asked).absolute() / "sala"
    standard = os.environ.get("XDG_CACHE_HOME", "")
    # XDG's specification: a relative path is ignored
    if os.path.isabs(standard):
        return Path(standard, "sala")
    try:
        cache = Path.home() / ".cache" / "sala"
        cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    except (RuntimeError, OSError) as error:
        return _without_home(str(error).rstrip("."))
    return cache


@functools.cache
def _without_home(why: str) -> Path:
    # one a user, so that the next run finds what this one built
    user = os.geteuid() if os.name == "posix" else "user"
    cache = Path(tempfile.gettempdir(), f"sala-{user}")
    logger.warning("no cache in a home folder (%s): %s is used; SALA_CACHE names another", why, cache)
    return cache
