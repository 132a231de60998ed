"""The report's folder: whole or not at all, and never less than there was."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sala.errors import InputError
from sala.model.checkpoint import output_folder

RESULTS, PAGE = "results.json", "index.html"


@contextmanager
def report_folder(path: Path) -> Iterator[Path]:
    """Give a working folder beside `path`; when the block ends without an error it takes the name `path`.

    A report that is there already stays until the new one is complete; then the old one is renamed aside, the new one
    takes its name, and the old one is deleted. An error or an interruption leaves the old one as it was.

    Raises:
        InputError: `path` exists and is no report, so that replacing it would delete something else.
    """
    path = path.expanduser().absolute()
    if path.exists() and not is_replaceable(path):
        raise InputError(
            f"output {str(path)!r} exists and is not a report of this demo (no {RESULTS} and {PAGE} in it); "
            "expected a new folder or an earlier report"
        )
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    for leftover in (new, old):
        # of a run that was killed between two renames
        shutil.rmtree(leftover, ignore_errors=True)
    with output_folder(new) as working:
        yield working
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def is_replaceable(path: Path) -> bool:
    """Return whether `path` is a folder that is empty or holds an earlier report."""
    if not path.is_dir():
        return False
    return not any(path.iterdir()) or all((path / name).is_file() for name in (RESULTS, PAGE))
