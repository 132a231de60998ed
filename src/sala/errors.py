"""Every error a user can cause: one line with what was wrong, the value, and what would be right."""

import difflib
from collections.abc import Iterable


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


class BackendError(SalaError):
    """A backend asked for by name that cannot run here."""


class MemoryLimitError(SalaError):
    """Work that would not fit into the machine's memory."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known name, or `""` when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
