"""Lightning attention in Triton, for GPUs; the layout of its work is in `scan`."""

from sala.ops.lightning.triton.scan import attend

__all__ = ["attend"]
