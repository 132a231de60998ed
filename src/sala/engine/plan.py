"""What a model will need, told before anything of it is loaded: weights, cache, work, and the length that fits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from sala.engine.load import find_device
from sala.engine.memory import available_bytes, estimate, longest_that_fits, process_bytes
from sala.errors import InputError, nearest, shortened
from sala.model import MiniCPMSALAConfig
from sala.model.report import cache_parts, network_shapes

INT4_GROUP = 128
MOST_BYTES = 2**60
UNITS = {
    "": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are stored, and the dtype of everything else.

    linear_bytes: of a weight with that many rows and columns in a layer's linear maps, None: as everything else.
    """

    dtype: torch.dtype
    note: str
    linear_bytes: Callable[[int, int], int] | None = None


def int4_bytes(rows: int, columns: int) -> int:
    """Return the bytes of a weight in 4 bits a number, with a scale and a zero point of 16 bits for each 128 of a row."""
    return rows * (-(-columns // 2) + 4 * -(-columns // INT4_GROUP))


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "bf16": Precision(torch.bfloat16, "all in bfloat16"),
        "fp32": Precision(torch.float32, "all in float32"),
        "fp16": Precision(torch.float16, "all in float16"),
        "int4": Precision(
            torch.bfloat16,
            f"the layers' linear weights in 4 bits with a 16-bit scale and zero point for {INT4_GROUP}, the rest in bfloat16",
            int4_bytes,
        ),
    }
)


def stored_precision(config: MiniCPMSALAConfig) -> str:
    """Return the precision that a checkpoint is stored in; bf16 for a shape without one."""
    plain = (name for name, row in PRECISIONS.items() if row.linear_bytes is None and row.dtype == config.dtype)
    return next(plain, "bf16")


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes at the peak of reading `length` tokens in chunks of `chunk`.

    process: the interpreter and its libraries, where they share the memory. cache_parts: what `cache` is made of.
    fits: whether all of it is at most `available`. longest: the most tokens of which that holds, 0 for none.
    """

    precision: str
    length: int
    chunk: int
    process: int
    weights: int
    cache: int
    working: int
    available: int
    longest: int
    device: str
    cache_parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return self.process + self.weights + self.cache + self.working

    @property
    def fits(self) -> bool:
        return self.total <= self.available


def plan_memory(
    config: MiniCPMSALAConfig,
    precision: str,
    length: int,
    chunk: int,
    *,
    process: int,
    available: int,
    device: str = "cpu",
) -> MemoryPlan:
    """Predict the memory of one sequence; device: the type of the one whose memory it is.

    Raises:
        InputError: no such precision, or a length or chunk below one.
    """
    if precision not in PRECISIONS:
        raise InputError(
            f"dtype {precision!r}; expected one of {', '.join(PRECISIONS)}{nearest(precision, PRECISIONS)}"
        )
    if min(length, chunk) < 1:
        raise InputError(f"{length} tokens in chunks of {chunk}; expected at least one of each")
    row = PRECISIONS[precision]
    weights = weight_bytes(config, row)

    def total(tokens: int) -> int:
        return process + weights + estimate(config, row.dtype, tokens, chunk, 0, device).total

    need = estimate(config, row.dtype, length, chunk, 0, device)
    return MemoryPlan(
        precision=precision,
        length=length,
        chunk=chunk,
        process=process,
        weights=weights,
        cache=need.cache,
        working=need.working,
        available=available,
        longest=longest_that_fits(lambda tokens: total(tokens) <= available),
        device=device,
        cache_parts=cache_parts(config, length, row.dtype.itemsize),
    )


def memory_of(device: str, available: int | None) -> tuple[str, int, int]:
    """Return the type of a device, bytes that this process has of its memory already, and bytes of it to plan with.

    device: as `open_checkpoint` takes it; with `available` bytes given "cuda" need not be on this machine.

    Raises:
        InputError: the device is unknown, or not on this machine and its memory not given.
    """
    kind = device if device == "cuda" and available is not None else find_device(device).type
    if kind == "cuda":
        return kind, 0, available_bytes(torch.device("cuda")) if available is None else available
    process = process_bytes()
    # what this process holds already is in the plan
    return kind, process, available_bytes(torch.device("cpu")) + process if available is None else available


def weight_bytes(config: MiniCPMSALAConfig, precision: Precision) -> int:
    """Return the bytes of all parameters, tied ones once."""
    size = 0
    for name, shape in network_shapes(config).items():
        if precision.linear_bytes is not None and len(shape) == 2 and ".layers." in name:
            size += precision.linear_bytes(*shape)
        else:
            size += shape.numel() * precision.dtype.itemsize
    return size


def parse_bytes(text: str) -> int:
    """Return the bytes of `32GiB`, `24 GB`, `512MiB` or a plain number.

    Raises:
        InputError: it is none of these.
    """
    digits = text.strip().upper().rstrip("KMGTIB ")
    unit = text.strip().upper()[len(digits) :].strip()
    try:
        size = float(digits) * UNITS[unit]
    except (KeyError, ValueError):
        size = 0.0
    if not 1 <= size <= MOST_BYTES:
        raise InputError(f"memory {shortened(text)!r}; expected a size such as 32GiB, 24GB or 512MiB, at most 1EiB")
    return int(size)
