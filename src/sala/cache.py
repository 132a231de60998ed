"""The folder that keeps what is made or fetched once on this machine: compiled kernels, models."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return where things of a kind are kept: in `$SALA_CACHE`, `$XDG_CACHE_HOME` or `~/.cache`. It may not be there yet."""
    base = os.environ.get("SALA_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sala" / kind
