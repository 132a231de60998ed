"""GPUs: their peaks and memory, by the names that people and torch call them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sala.errors import InputError, nearest


@dataclass(frozen=True, slots=True)
class Gpu:
    """Dense peaks in TFLOP/s (bfloat16 on tensor cores, float32 without them) and memory in GiB."""

    bfloat16: float
    float32: float
    memory: float


# makers' data sheets, without sparsity
GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(312, 19.5, 80),
    "a800": Gpu(312, 19.5, 80),
    "h100": Gpu(989.4, 66.9, 80),
    "h200": Gpu(989.4, 66.9, 141),
    "b200": Gpu(2250, 75, 180),
    "l40s": Gpu(362, 91.6, 48),
    "rtx-4090": Gpu(165.2, 82.6, 24),
    "rtx-5090": Gpu(209.5, 104.8, 32),
}
# what torch calls these cards. PCIe and NVL cards of the same generation are slower where they are not named
DEVICE_NAMES: Mapping[str, str] = {
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA A800-SXM4-80GB": "a800",
    "NVIDIA A800 80GB PCIe": "a800",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 5090": "rtx-5090",
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """`gpus` None: as many as a stage's mesh has. mfu: operations done a second as a part of the peak."""

    gpu: str
    peak_flops_s: float
    memory_bytes: float
    mfu: float
    gpus: int | None = None


def cluster(
    gpu: str, *, precision: str, gpus: int | None = None, memory_gib: float | None = None, mfu: float
) -> Cluster:
    """Return a cluster of cards of a name in `GPUS`, or of a number of TFLOP/s with their memory.

    Raises:
        InputError: the name is not known, or a number comes without memory.
    """
    if not 0 < mfu <= 1:
        raise InputError(f"--mfu {mfu}: a part of the peak; expected above 0 and at most 1, such as 0.4")
    if gpu in GPUS:
        card = GPUS[gpu]
        tflops, memory_gib = getattr(card, precision), card.memory if memory_gib is None else memory_gib
    else:
        try:
            tflops = float(gpu)
        except ValueError:
            raise InputError(
                f"--gpu {gpu!r} is not known; there are {', '.join(GPUS)}, or a number of TFLOP/s{nearest(gpu, GPUS)}"
            ) from None
        if memory_gib is None:
            raise InputError(f"--gpu {gpu} says TFLOP/s only; give --memory, the GiB of a card")
    if not (0 < tflops < math.inf and 0 < memory_gib < math.inf):
        raise InputError(f"--gpu {gpu} with --memory {memory_gib}: expected numbers above 0")
    return Cluster(gpu, tflops * 1e12, memory_gib * 2**30, mfu, gpus)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the dense FLOP/s of a GPU in a recipe's precision as in `GPUS`; None for another device."""
    if device.type != "cuda":
        return None
    name = DEVICE_NAMES.get(torch.cuda.get_device_name(device))
    return None if name is None else getattr(GPUS[name], precision) * 1e12
