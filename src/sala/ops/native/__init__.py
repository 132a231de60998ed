"""C++ behind the operators' `cpu` backends: built on first use for the processor at hand, and kept."""

from sala.ops.native.library import Function, at_level, describe, levels_here, unavailable
from sala.ops.native.operator import operator, refuses, refuses_many_rows, refuses_mixed
from sala.ops.native.tape import Tape, kept, record

__all__ = [
    "Function",
    "Tape",
    "at_level",
    "describe",
    "kept",
    "levels_here",
    "operator",
    "record",
    "refuses",
    "refuses_many_rows",
    "refuses_mixed",
    "unavailable",
]
