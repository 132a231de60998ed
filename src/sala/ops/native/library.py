"""The C++ sources of this folder as one shared library: compiled once a machine, chosen by its processor, loaded."""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sala.errors import BackendError, DiskError, nearest
from sala.ops.native.compiler import BuildError, CannotBuildError, find_compiler
from sala.ops.native.store import Built, Store
from sala.ops.native.tape import recording

logger = logging.getLogger("sala")

SOURCES = Path(__file__).parent
# libraries that came with the package, built where it was packed (scripts/build_wheel.py)
SHIPPED = SOURCES / "built"
# no -ffast-math: infinities and NaN keep their meaning
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math")
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
VNNI = (*AVX512, "-mavx512vnni")
BF16 = (*VNNI, "-mavx512bf16")


@dataclass(frozen=True, slots=True)
class Level:
    """A class of processors: what they must have (names of /proc/cpuinfo) and how to compile for them."""

    needs: frozenset[str]
    flags: tuple[str, ...]
    # for tests: never chosen
    automatic: bool = True


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_VNNI = _AVX512 | {"avx512_vnni"}
_BF16 = _VNNI | {"avx512_bf16"}

# the best first
LEVELS = {
    "amx": Level(_BF16 | {"amx_tile", "amx_bf16"}, (*BF16, "-mamx-tile", "-mamx-bf16")),
    "avx512-bf16": Level(_BF16, BF16),
    "avx512-vnni": Level(_VNNI, VNNI),
    "avx512": Level(_AVX512, AVX512),
    "avx2": Level(_AVX2, AVX2),
    "portable": Level(frozenset(), ()),
    # the tile instructions in plain C++, so that the code on top of them is tested where no processor has them
    "amx-emulated": Level(_BF16, (*BF16, "-DSALA_EMULATE_AMX"), automatic=False),
}


@dataclass(frozen=True, slots=True)
class _Library:
    level: str
    compiler: str
    loaded: ctypes.CDLL
    # open as long as the library: debuggers find it by a path through its folder; None where it came with the package
    store: Store | None


class Function:
    """A C function of the library, called with tensors' addresses and plain numbers.

    types: one letter an argument: p an address, i an integer of 64 bits, f a double.
    """

    TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_double}  # noqa: RUF012

    def __init__(self, name: str, types: str):
        self.name = name
        self.letters = types.replace(" ", "")
        self.types = [self.TYPES[letter] for letter in self.letters]
        self.of_level: dict[str, ctypes._NamedFuncPointer] = {}

    def __call__(self, *arguments: int | float | None) -> None:
        library = _active()
        function = self.of_level.get(library.level)
        if function is None:
            function = getattr(library.loaded, self.name)
            function.argtypes, function.restype = self.types, None
            self.of_level[library.level] = function
        if (tape := recording()) is not None:
            tape.add(library.loaded, self.name, self.letters, arguments)
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
    """Load the best level that is built or can be: an old compiler may not know the newest instructions."""
    wanted = os.environ.get("SALA_CPU_LEVEL")
    if wanted == "none":
        raise BuildError("SALA_CPU_LEVEL=none switches them off")
    if wanted and wanted not in levels_here():
        raise BuildError(f"SALA_CPU_LEVEL={wanted} is not one of {', '.join(levels_here())}, which this processor runs")
    levels = [wanted] if wanted else [name for name in levels_here() if LEVELS[name].automatic]
    for level in levels[:-1]:
        try:
            return _load(level)
        except CannotBuildError:
            # said once, of the last: of the levels between, one may have been built before
            continue
        except BuildError as error:
            logger.warning("the C++ kernels for %s are not used: %s", level, error)
    return _load(levels[-1])


def _store() -> Store:
    try:
        return Store()
    except DiskError as error:
        # of every level alike
        raise CannotBuildError(str(error)) from error


_loaded: dict[str, _Library] = {}


def _load(level: str) -> _Library:
    if level not in _loaded:
        store = None
        if (built := shipped(level)) is None:
            store = _store()
            built = _built(level, store)
        try:
            loaded = ctypes.CDLL(built.path)
        except OSError as error:
            folder = SHIPPED if store is None else store.folder
            raise BuildError(f"the library for {level} in {str(folder)!r} cannot be loaded: {error}") from error
        loaded.sala_prepare.argtypes, loaded.sala_prepare.restype = [ctypes.c_void_p], ctypes.c_int
        if loaded.sala_prepare(_torch_parallel()):
            raise BuildError("the system does not allow the tile registers of AMX; a newer kernel does")
        logger.info("CPU kernels: %s", level)
        _loaded[level] = _Library(level, built.compiler, loaded, store)
    return _loaded[level]


def sources_and_flags(level: str) -> tuple[list[Path], list[str]]:
    """Return what a level's library is compiled from, and how."""
    # more of them from the environment: sanitizers, debugging
    flags = [*FLAGS, *LEVELS[level].flags, *os.environ.get("SALA_CXXFLAGS", "").split()]
    return sorted(SOURCES.glob("*.cpp")), flags


def content_name(level: str) -> str:
    """Return the start of a library's name, which tells what it is made of: sources, flags, kind of processor."""
    sources, flags = sources_and_flags(level)
    content = hashlib.sha256("\0".join([platform.machine(), *flags]).encode())
    for path in [*sources, *sorted(SOURCES.glob("*.h"))]:
        content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{level}-{content.hexdigest()[:16]}-"


def shipped(level: str) -> Built | None:
    """Return the library of a level that came with the package, made of the sources that are here; None without one."""
    path = next(SHIPPED.glob(f"{content_name(level)}*.so"), None)
    if path is None:
        return None
    return Built(str(path), path.with_suffix(".txt").read_text(encoding="utf-8").strip())


def _built(level: str, store: Store) -> Built:
    """Return a level's library: the one of this compiler, built unless it is there; without a compiler, any one's.

    Its name ends in who made it.
    """
    sources, flags = sources_and_flags(level)
    start = content_name(level)
    try:
        compiler = find_compiler()
    except CannotBuildError as error:
        return _built_before(store, start, error)
    name = start + hashlib.sha256("\0".join([*compiler.command, compiler.version]).encode()).hexdigest()[:8]
    with contextlib.suppress(DiskError):
        if built := store.find(name):
            return built
    try:
        with store.lock(name):
            # another process may have built it while this one waited
            if built := _found(store, name):
                return built
            logger.warning("building the CPU kernels for %s with %s, once on this machine", level, compiler.version)
            return store.add(name, compiler.build(sources, flags), compiler.version)
    except OSError as error:
        why_not = f"{str(store.folder)!r} cannot be written: {error.strerror}; set SALA_CACHE to a folder that can"
        return _built_before(store, start, CannotBuildError(why_not))


def _found(store: Store, name: str) -> Built | None:
    try:
        return store.find(name)
    except DiskError as error:
        logger.warning("a built library is not loaded: %s", error)
        return None


def _built_before(store: Store, start: str, why_not: CannotBuildError) -> Built:
    """Return the newest library whose name begins so; where there is none, raise why it cannot be built."""
    for name in store.names(start):
        if built := _found(store, name):
            return built
    raise why_not


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
