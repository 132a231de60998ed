"""The machine's C++ compiler: found, asked for its version, run."""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")


class BuildError(Exception):
    """The library cannot be built or used here; the message says why, and what would help."""


class CannotBuildError(BuildError):
    """Nothing new can be built here, whatever the level; what was built before can be used."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A command that compiles C++, its arguments included (`ccache g++`, `g++ -m64`), and the first line of its version."""

    command: tuple[str, ...]
    version: str

    def build(self, sources: Sequence[Path], flags: Sequence[str]) -> bytes:
        """Return the shared library made of `sources`.

        Raises:
            BuildError: the compiler fails, or cannot be run.
            CannotBuildError: there is no place for what it makes.
        """
        try:
            return self._build(sources, flags)
        except OSError as error:
            raise CannotBuildError(
                f"nothing can be compiled: {error}; set TMPDIR to a folder that can be written"
            ) from error

    def _build(self, sources: Sequence[Path], flags: Sequence[str]) -> bytes:
        command = [*self.command, *flags]
        # not in the cache, where somebody may come upon half of it
        with tempfile.TemporaryDirectory(prefix="sala-") as work:
            objects = [Path(work, f"{source.stem}.o") for source in sources]
            compilations = [
                [*command, "-c", str(source), "-o", str(made)] for source, made in zip(sources, objects, strict=True)
            ]
            with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
                for _ in pool.map(_run, compilations):
                    pass
            library = Path(work, "library.so")
            _run([*command, "-shared", *map(str, objects), "-o", str(library)])
            return library.read_bytes()


def find_compiler() -> Compiler:
    """Return the compiler that $CXX names, else the first that is installed.

    Raises:
        CannotBuildError: there is none, $CXX is no command, or it does not run.
    """
    try:
        asked = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise CannotBuildError(
            f"CXX={os.environ['CXX']!r} is no command: {error}; expected one such as 'g++ -m64'"
        ) from error
    names = asked[:1] or COMPILERS
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        raise CannotBuildError(
            f"no C++ compiler ({', '.join(names)}) is installed; install g++ or clang++ "
            "(Debian, Ubuntu: g++; Fedora: gcc-c++; macOS: the command line tools)"
        )
    command = (path, *asked[1:])
    try:
        version = _run([*command, "--version"])
    except BuildError as error:
        raise CannotBuildError(str(error)) from error
    return Compiler(command, version.partition("\n")[0].strip() or Path(path).name)


def _run(command: Sequence[str]) -> str:
    """Return what a command prints."""
    name = Path(command[0]).name
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{name} cannot be run: {error.strerror}") from error
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()[-1:]
        raise BuildError(f"{name} failed: {errors[0] if errors else result.returncode}")
    return result.stdout
