"""The C++ sources of this folder as one shared library: compiled once a machine, chosen by its processor, loaded."""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sala.cache import cache_folder
from sala.errors import BackendError, DiskError, nearest

logger = logging.getLogger("sala")

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# no -ffast-math: infinities and NaN keep their meaning
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")


@dataclass(frozen=True, slots=True)
class Level:
    """A class of processors: what they must have (names of /proc/cpuinfo) and how to compile for them."""

    needs: frozenset[str]
    flags: tuple[str, ...]
    # for tests: never chosen
    automatic: bool = True


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_BF16 = _AVX512 | {"avx512_bf16"}

# the best first
LEVELS = {
    "amx": Level(_BF16 | {"amx_tile", "amx_bf16"}, (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")),
    "avx512-bf16": Level(_BF16, (*AVX512, "-mavx512bf16")),
    "avx512": Level(_AVX512, AVX512),
    "avx2": Level(_AVX2, AVX2),
    "portable": Level(frozenset(), ()),
    # the tile instructions in plain C++, so that the code on top of them is tested where no processor has them
    "amx-emulated": Level(_BF16, (*AVX512, "-mavx512bf16", "-DSALA_EMULATE_AMX"), automatic=False),
}


class BuildError(Exception):
    """The library cannot be built or used here; the message says why, and what would help."""


@dataclass(frozen=True, slots=True)
class _Library:
    level: str
    compiler: str
    loaded: ctypes.CDLL


class Function:
    """A C function of the library, called with tensors' addresses and plain numbers.

    types: one letter an argument: p an address, i an integer of 64 bits, f a double.
    """

    TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_double}  # noqa: RUF012

    def __init__(self, name: str, types: str):
        self.name = name
        self.types = [self.TYPES[letter] for letter in types.replace(" ", "")]
        self.of_level: dict[str, ctypes._NamedFuncPointer] = {}

    def __call__(self, *arguments: int | float | None) -> None:
        library = _active()
        function = self.of_level.get(library.level)
        if function is None:
            function = getattr(library.loaded, self.name)
            function.argtypes, function.restype = self.types, None
            self.of_level[library.level] = function
        function(*arguments)


def levels_here() -> list[str]:
    """Return the levels that this processor can run, the best first, those for tests included."""
    has = _processor_features()
    return [name for name, level in LEVELS.items() if level.needs <= has]


# torch.compile takes the answer as it is now: what it rests on, files and processes, cannot be traced
@torch.compiler.assume_constant_result
def unavailable() -> str | None:
    """Return why the library cannot be used on this machine, None when it can; the first call may build it."""
    try:
        _active()
    except BuildError as error:
        return str(error)
    return None


def describe() -> str:
    """Return the level that runs and what it was built with, in words.

    Raises:
        BuildError: the library cannot be used.
    """
    library = _active()
    return f"C++ for {library.level}, built with {library.compiler}"


@contextlib.contextmanager
def at_level(level: str) -> Iterator[None]:
    """Run what is inside at one of `levels_here`, for tests.

    Raises:
        BackendError: no such level, or not on this processor.
        BuildError: it cannot be built.
    """
    if level not in levels_here():
        raise BackendError(f"level {level!r} does not run here; {', '.join(levels_here())} do{nearest(level, LEVELS)}")
    global _library
    before, _library = _library, _load(level)
    try:
        yield
    finally:
        _library = before


_library: _Library | BuildError | None = None


def _active() -> _Library:
    global _library
    if _library is None:
        try:
            _library = _best()
        except BuildError as error:
            # asked again, the answer is the same: a machine does not grow a compiler in between
            _library = error
            logger.warning("the C++ kernels are not used: %s", error)
    if isinstance(_library, BuildError):
        raise _library
    return _library


def _best() -> _Library:
    """Load the best level that can be built: an old compiler may not know the newest instructions."""
    wanted = os.environ.get("SALA_CPU_LEVEL")
    if wanted == "none":
        raise BuildError("SALA_CPU_LEVEL=none switches them off")
    if wanted is not None and wanted not in levels_here():
        raise BuildError(f"SALA_CPU_LEVEL={wanted} is not one of {', '.join(levels_here())}, which this processor runs")
    levels = [wanted] if wanted else [name for name in levels_here() if LEVELS[name].automatic]
    _find_compiler()  # with none at all, no level can be built: one complaint, not one a level
    for level in levels[:-1]:
        try:
            return _load(level)
        except BuildError as error:
            logger.warning("the C++ kernels for %s are not used: %s", level, error)
    return _load(levels[-1])


_loaded: dict[str, _Library] = {}


def _load(level: str) -> _Library:
    if level not in _loaded:
        compiler = _find_compiler()
        path = _build(level, *compiler)
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"{path} cannot be loaded: {error}; delete it to have it built again") from error
        loaded.sala_prepare.argtypes, loaded.sala_prepare.restype = [ctypes.c_void_p], ctypes.c_int
        if loaded.sala_prepare(_torch_parallel()):
            raise BuildError("the system does not allow the tile registers of AMX; a newer kernel does")
        logger.info("CPU kernels: %s", level)
        _loaded[level] = _Library(level, compiler[1], loaded)
    return _loaded[level]


def _find_compiler() -> tuple[str, str]:
    """Return the compiler's path and the first line of its version."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        raise BuildError(
            f"no C++ compiler ({', '.join(names)}) is installed; install g++ or clang++ "
            "(Debian, Ubuntu: g++; Fedora: gcc-c++; macOS: the command line tools)"
        )
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return path, version.partition("\n")[0].strip() or Path(path).name


def _build(level: str, compiler: str, version: str) -> Path:
    """Return the library's file, compiled unless the same sources were before with the same compiler and flags."""
    sources = sorted(SOURCES.glob("*.cpp"))
    # more of them from the environment: sanitizers, debugging
    flags = [*FLAGS, *LEVELS[level].flags, *os.environ.get("SALA_CXXFLAGS", "").split()]
    content = hashlib.sha256("\0".join([version, platform.machine(), *flags]).encode())
    for path in [*sources, *sorted(SOURCES.glob("*.h"))]:
        content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        folder = cache_folder("native")
    except DiskError as error:
        raise BuildError(str(error)) from error
    target = folder / f"{level}-{content.hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        with _lock(folder / f"{target.name}.lock"), tempfile.TemporaryDirectory(dir=folder) as work:
            if not target.exists():  # built by another process while this one waited
                logger.warning("building the CPU kernels for %s with %s, once on this machine", level, version)
                _compile([compiler, *flags], sources, Path(work), target)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error}; set SALA_CACHE to a folder that can") from error
    return target


def _compile(command: list[str], sources: list[Path], work: Path, target: Path) -> None:
    objects = [work / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        for _ in pool.map(
            _run, [[*command, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
        ):
            pass
    built = work / "library.so"
    _run([*command, "-shared", *map(str, objects), "-o", str(built)])
    # in one step, so that nobody loads half a library
    built.replace(target)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()[-1:]
        raise BuildError(f"{Path(command[0]).name} failed: {errors[0] if errors else result.returncode}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time build, where the system has file locks; elsewhere the last one to finish wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _processor_features() -> frozenset[str]:
    """Return what the processor has, by Linux's names; nothing where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def _torch_parallel() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP library that torch runs on, None where there is none."""
    try:
        # a look-up in a library goes on in the libraries that it was linked with
        torch_cpu = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
        return ctypes.cast(ctypes.CDLL(str(torch_cpu)).GOMP_parallel, ctypes.c_void_p).value
    except (StopIteration, OSError, AttributeError):
        return None
