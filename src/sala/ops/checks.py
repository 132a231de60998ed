"""What every operator asks of its tensors before a kernel reads them by address: a dtype that is computed with, one device."""

import torch
from torch import Tensor

from sala.errors import InputError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)


def check_dtype(what: str, *tensors: Tensor | None) -> None:
    """Check that tensors are of dtypes that operators compute with; None is left out.

    Raises:
        InputError: one is not.
    """
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            raise InputError(f"{what} must be one of {NAMES}, not {tensor.dtype}")


def check_devices(**tensors: Tensor | None) -> None:
    """Check that tensors, given by name, are on the device of the first; None is left out.

    Raises:
        InputError: one is not.
    """
    first, device = next((name, x.device) for name, x in tensors.items() if x is not None)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise InputError(f"{name} on {tensor.device}, {first} on {device}; expected one device")
