"""Block-sparse attention in Triton, for CUDA devices; the layout of its work and its floors are in docs/kernels.md."""

from sala.ops.infllm.triton.attend import attend
from sala.ops.infllm.triton.compress import compress
from sala.ops.infllm.triton.select import select

__all__ = ["attend", "compress", "select"]
