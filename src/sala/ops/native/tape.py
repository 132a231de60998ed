"""Calls of the library in the order they were made, which C++ makes again in one go: a CPU's answer to CUDA graphs.

A tape holds addresses. Tensors that are made while it is recorded are kept, and every call is made again with the same
ones: what differs between two runs must be read from memory (positions), and written into tensors from before (caches).
"""

import contextlib
import ctypes
import struct
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from sala.errors import BackendError

_EMPTY = ("aten.empty.", "aten.new_empty.", "aten.empty_like.", "aten.empty_strided.", "aten.new_empty_strided.")


class Tape:
    """What was recorded; `replay` runs it again."""

    def __init__(self) -> None:
        self.words = bytearray()
        self.kept: list[Any] = []

    def add(self, library: ctypes.CDLL, name: str, letters: str, arguments: tuple[Any, ...]) -> None:
        try:
            address = ctypes.cast(getattr(library, f"{name}_words"), ctypes.c_void_p).value
        except AttributeError as error:
            raise BackendError(f"{name} runs, which has no form for a tape; expected one token a row") from error
        numbers = (0 if argument is None else argument for argument in arguments)
        kinds = "".join("d" if letter == "f" else "q" for letter in letters)
        self.words += struct.pack(f"=qq{kinds}", address, len(letters), *numbers)
        self.library = library

    def replay(self) -> None:
        buffer = (ctypes.c_char * len(self.words)).from_buffer(self.words)
        self.library.sala_replay(ctypes.c_void_p(ctypes.addressof(buffer)), ctypes.c_int64(len(self.words) // 8))


class _Watch(TorchDispatchMode):
    """Keeps what is made while a tape is recorded, and refuses what torch computes, which the tape would not have."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or str(func).startswith(_EMPTY)):
            raise BackendError(f"{func} runs between the kernels; expected kernels alone")
        out = func(*args, **(kwargs or {}))
        self.tape.kept.append(out)
        return out


_recording: Tape | None = None


def recording() -> Tape | None:
    """Return the tape that calls are written to, None outside of `record`."""
    return _recording


def kept(value: Any) -> Any:
    """Return memory that a call is given the address of, and that a tape must not lose."""
    if _recording is not None:
        _recording.kept.append(value)
    return value


@contextlib.contextmanager
def record() -> Iterator[Tape]:
    """Run what is inside and write the library's calls to a tape.

    Raises:
        BackendError: something else computes too, or a function has no form for a tape; what ran before it has run.
    """
    global _recording
    assert _recording is None, "a tape is being recorded already"
    tape = _recording = Tape()
    try:
        with _Watch(tape):
            yield tape
    finally:
        _recording = None
