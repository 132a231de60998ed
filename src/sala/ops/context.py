"""What an operator sees of the other ranks when several of them hold one packed row of tokens together."""

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """The ranks that hold a packed row, each an equal, contiguous part of it, in the order of their numbers.

    Every rank calls `gather` equally often, in the same order, with tensors of the same shape and dtype, and lets its result
    take part in what it returns, with a weight of zero if need be: the backward pass is a collective too, and a rank that
    left it out would let the others wait for ever.
    """

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""

    @property
    def ranks(self) -> int:
        """How many there are."""

    def gather(self, x: Tensor) -> Tensor:
        """Return the `x` of every rank, (ranks, *x.shape); its gradient is summed over the ranks' uses of it."""
