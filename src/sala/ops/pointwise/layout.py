"""How tensors lie in memory for backends that read rows by address."""

from torch import Tensor


def rows(x: Tensor) -> tuple[Tensor, int]:
    """Return x and the stride between its rows (all dimensions but the last), copied where they have more than one."""
    if x.is_contiguous():
        return x, x.shape[-1]
    shape, stride = x.shape, x.stride()
    if stride[-1] == 1 and all(stride[i] == stride[i + 1] * shape[i + 1] for i in range(x.ndim - 2)):
        return x, stride[-2]
    return x.contiguous(), shape[-1]


def count(x: Tensor) -> int:
    """Return how many rows x has."""
    return x.numel() // max(1, x.shape[-1])


def close(x: Tensor) -> Tensor:
    """Return x, copied unless the numbers of its last dimension stand side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
