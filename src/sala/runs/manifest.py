"""The manifest of a checkpoint, which tells whether its files are those that were written; and which checkpoints there are."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from sala.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
# "-2" and so on: the same step saved again
NAME = re.compile(r"step-(\d{10,})(?:-(\d+))?")


def newest_facts(folder: Path) -> dict[str, Any] | None:
    """Return the facts of the newest complete checkpoint, which is not verified; None when there is none.

    Raises:
        CheckpointError: its manifest is damaged.
    """
    there = published(folder)
    return read_manifest(there[-1])["facts"] if there else None


def published(folder: Path) -> list[Path]:
    """Return the complete checkpoints from the oldest to the newest, one a step."""
    if not folder.is_dir():
        return []
    folders = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
    return list({order(path)[0]: path for path in sorted(folders, key=order)}.values())


def order(folder: Path) -> tuple[int, int]:
    """Return (step, how many times it has been saved) of a checkpoint's folder."""
    found = NAME.fullmatch(folder.name)
    assert found is not None, folder
    return int(found[1]), int(found[2] or 1)


def checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(manifest | {"sha256": _digest(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint; CheckpointError if it is not the one that was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{MANIFEST} does not say its format")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"its format is {manifest['format']!r}, and this version of sala reads format {FORMAT}")
    expected = manifest.pop("sha256", None)
    if expected != _digest(manifest):
        raise CheckpointError(f"{MANIFEST} has changed: sha256 {_digest(manifest)}, and it says {expected}")
    return manifest


def verify(folder: Path, files: dict[str, dict[str, Any]], rank: int, size: int) -> None:
    """Compare this rank's share of a checkpoint's files with the manifest: all sizes, then all checksums."""
    share = sorted(files, key=lambda name: -files[name]["bytes"])[rank::size]
    for name in share:
        path, expected = folder / name, files[name]["bytes"]
        if not path.is_file():
            raise CheckpointError(f"{name} is missing; {MANIFEST} says {expected:,} bytes")
        if (found := path.stat().st_size) != expected:
            raise CheckpointError(f"{name} has {found:,} bytes; {MANIFEST} says {expected:,}")
    for name in share:
        if (digest := checksum(folder / name)["sha256"]) != files[name]["sha256"]:
            raise CheckpointError(f"{name} has changed: sha256 {digest}; {MANIFEST} says {files[name]['sha256']}")


def sync_folder(folder: Path) -> None:
    """Make names in a folder last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
