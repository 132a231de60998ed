"""Files of measurements: whole or not there."""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sala.errors import InputError


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write `results` as JSON; an earlier file stays until the new one is complete.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    text = json.dumps(results, indent=1) + "\n"
    write_atomically(path, lambda working: working.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, which then takes its name.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    working = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(working)
        working.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            working.unlink()
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error
