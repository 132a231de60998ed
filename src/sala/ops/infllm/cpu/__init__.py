"""Block-sparse attention in C++ (`ops/native`)."""

from sala.ops.infllm.cpu.attend import attend
from sala.ops.infllm.cpu.compress import compress
from sala.ops.infllm.cpu.select import select

__all__ = ["attend", "compress", "select"]
