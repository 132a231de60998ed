"""Whether a prompt fits: what weights, cache and one chunk need, against what the machine has."""

import os
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sala.errors import MemoryLimitError
from sala.model import MiniCPMSALAConfig
from sala.model.kinds import KINDS, runs
from sala.model.report import cache_bytes, num_parameters
from sala.ops.dense.eager import MASK_ELEMENTS, TILE_QUERIES
from sala.ops.dispatch import explain, unavailable
from sala.ops.infllm.eager import SELECT_QUERIES

# Numbers alive at the worst moment of a mixer, a token: so many times its width (heads x head width), in the model's
# dtype, by operator and backend. Projections, norms and rotation are in it, and copies in an operator's own layout.
# Fitted to peaks of models of 10, 40 and 100 million parameters in float32 and bfloat16, chunks of 256 to 4096.
MIXER_WIDTHS: Mapping[str, Mapping[str, int]] = {
    "lightning": {"eager": 33, "cpu": 20},
    "infllm": {"eager": 26, "cpu": 24},
    "dense": {"eager": 14, "cpu": 14},
}
# hidden states, the residual beside them and a norm's float32
STREAM_WIDTHS = 4
# gate, up and their product
MLP_WIDTHS = 3
# what the process holds for each byte alive: glibc keeps freed memory in pieces (measured: 1.1 to 2)
RETAINED = 1.5
# what a first run loads, buffers of the matrix library, tiles of scores and states
FIXED_BYTES = 40 * 2**20

# On a GPU, with the kernels there: counted, not measured. Tensors alive at the worst moment of an MLP or a mixer, C x
# their width: hidden states and the norm of them; gate, up and product; queries and keys before and after norm and
# rotation, and values. tests/engine/test_memory.py counts what the model asks for.
CUDA_MLP_STREAM_WIDTHS = 4
CUDA_STREAM_WIDTHS = 2
CUDA_MIXER_WIDTHS = 5
CUDA_LIGHTNING_WIDTHS = 4
# while blocks are chosen: queries and output, beside block scores of up to so many bytes, but of so many tokens at least
# (PANEL_BYTES and SCORE_ROWS of ops/infllm/triton/select.py, which a machine without Triton cannot import)
CUDA_CHOICE_WIDTHS = 2
PANEL_BYTES = 2**28
PANEL_TOKENS = 128
# an allowance: workspaces of libraries (cuBLAS takes 32 MiB a stream on a Hopper), the kernels themselves, what the
# allocator rounds up, a recorded step of decoding
CUDA_FIXED_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that reading a prompt takes at its peak."""

    weights: int
    cache: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.working


def estimate(
    config: MiniCPMSALAConfig, dtype: torch.dtype, length: int, chunk: int, parameters: int, device: str = "cpu"
) -> Need:
    """Return what `length` tokens need when a network of `parameters` reads them `chunk` at a time.

    device: its type. Of "cuda" it is the device's memory, whether or not this machine has one.
    """
    itemsize = dtype.itemsize
    chunk = min(chunk, length)
    if device == "cuda" and why_no_kernels() is None:
        working = _cuda_working_bytes(config, itemsize, length, chunk)
    else:
        working = _working_bytes(config, itemsize, length, chunk, device)
    # of one layer at a time
    return Need(weights=parameters * itemsize, cache=cache_bytes(config, length, itemsize), working=working)


def why_no_kernels() -> str | None:
    """Return why this machine's GPU runs plain torch instead of the kernels for GPUs, None where it does not, or is none."""
    return unavailable("infllm", "triton") if torch.cuda.is_available() else None


def check_memory(
    config: MiniCPMSALAConfig,
    dtype: torch.dtype,
    device: torch.device,
    length: int,
    chunk: int,
    available: int | None = None,
) -> None:
    """Refuse what would not fit.

    available: bytes, asked of the machine or the GPU when None.

    Raises:
        MemoryLimitError: says what is needed, what there is, and how many tokens fit.
    """
    available = available_bytes(device) if available is None else available
    parameters = num_parameters(config)
    need = estimate(config, dtype, length, chunk, parameters, device.type)
    if need.total <= available:
        return
    fits = tokens_that_fit(config, dtype, chunk, parameters, available, device.type)
    advice = f"{fits:,} tokens fit" if fits else "not even the weights fit"
    kind = "GPU memory" if device.type == "cuda" else "memory"
    raise MemoryLimitError(
        f"{length:,} tokens (prompt and answer) need {human_bytes(need.total)} of {kind}: {human_bytes(need.weights)} weights, "
        f"{human_bytes(need.cache)} cache, {human_bytes(need.working)} to work in; "
        f"{human_bytes(available)} are available, {advice}"
    )


def tokens_that_fit(
    config: MiniCPMSALAConfig,
    dtype: torch.dtype,
    chunk: int,
    parameters: int,
    available: int,
    device: str = "cpu",
) -> int:
    """Return the longest length whose need is at most `available` bytes, 0 when there is none."""
    return longest_that_fits(
        lambda length: estimate(config, dtype, length, chunk, parameters, device).total <= available
    )


def longest_that_fits(fits: Callable[[int], bool]) -> int:
    """Return the largest length of which `fits` says so, which it does of all below; 0 when of none."""
    longest, too_long = 0, 1
    while fits(too_long):
        longest, too_long = too_long, too_long * 2
    while too_long - longest > 1:
        middle = (longest + too_long) // 2
        if fits(middle):
            longest = middle
        else:
            too_long = middle
    return longest


def available_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Return the memory that can still be taken: of the device, or of the machine and its control groups.

    root: where `proc` and `sys` are.
    """
    if device.type == "cuda":
        # and what torch keeps of it and has no tensors in
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    limits = [_machine_bytes(root), *_group_bytes(root)]
    return min(limits)


def human_bytes(size: float) -> str:
    """Return a size in the unit that fits, by powers of 1024."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def process_bytes() -> int:
    """Return what this process holds: before a model is loaded, the interpreter and its libraries."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: its peak, which is the same before the work
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def _working_bytes(config: MiniCPMSALAConfig, itemsize: int, length: int, chunk: int, device: str) -> int:
    """Return what reading a chunk takes on top of weights and cache: the largest layer, logits, and tiles.

    On a GPU that of plain torch, and rather much: its allocator gives memory back to itself at once.
    """
    mixer = max(_mixer_bytes(config, kind, itemsize, length, chunk, device) for kind in set(config.mixer_types))
    mlp = MLP_WIDTHS * config.intermediate_size * itemsize * chunk
    stream = STREAM_WIDTHS * config.hidden_size * itemsize * chunk
    logits = config.vocab_size * (4 + itemsize)
    token_ids = 8 * length
    fixed = CUDA_FIXED_BYTES if device == "cuda" else FIXED_BYTES
    return int(RETAINED * (stream + max(mixer, mlp) + logits)) + _selection_bytes(config, length) + token_ids + fixed


def _cuda_working_bytes(config: MiniCPMSALAConfig, itemsize: int, length: int, chunk: int) -> int:
    """As `_working_bytes`, on a GPU: torch's allocator gives memory back to itself at once, and kernels keep no scores."""
    stream = config.hidden_size * itemsize * chunk
    mlp = CUDA_MLP_STREAM_WIDTHS * stream + MLP_WIDTHS * config.intermediate_size * itemsize * chunk
    mixer = max(_cuda_mixer_bytes(config, kind, itemsize, length, chunk) for kind in set(config.mixer_types))
    logits = config.vocab_size * (4 + itemsize)
    # positions, and the angles, sines and cosines of a rotation
    places = (8 + 3 * 4 * (config.head_dim or 0) // 2) * chunk
    token_ids = 8 * length
    return max(mlp, CUDA_STREAM_WIDTHS * stream + mixer) + logits + places + token_ids + CUDA_FIXED_BYTES


def _cuda_mixer_bytes(config: MiniCPMSALAConfig, kind: str, itemsize: int, length: int, chunk: int) -> int:
    assert config.lightning_head_dim is not None and config.lightning_nh is not None
    assert config.head_dim is not None and config.num_key_value_heads is not None
    if KINDS[kind].operator == "lightning":
        # the states of segments of 1,024 tokens (MIN_SEGMENT of ops/lightning/triton/scan.py), and the last one
        states = (chunk // 1024 + 2) * config.lightning_nh * config.lightning_head_dim**2 * 4
        return CUDA_LIGHTNING_WIDTHS * config.lightning_nh * config.lightning_head_dim * itemsize * chunk + states
    width = config.num_attention_heads * config.head_dim * itemsize * chunk
    if KINDS[kind].operator == "dense":
        # or a step's scores, their softmax and that rounded
        return max(CUDA_MIXER_WIDTHS * width, config.num_attention_heads * length * (8 + itemsize))
    if length <= config.sparse_geometry.first_sparse_position(length - 1):
        return CUDA_MIXER_WIDTHS * width
    geometry = config.sparse_geometry
    # a panel for the windows that start in a block, and one for each of those that reach into it
    panels = 1 + (geometry.kernel_size - 1) // geometry.kernel_stride
    token_bytes = 4 * config.num_key_value_heads * panels * -(-length // geometry.block_size)
    scores = min(chunk * token_bytes, max(PANEL_BYTES, PANEL_TOKENS * token_bytes))
    tokens = scores // token_bytes
    # lists of blocks that tokens read together are no longer than all of theirs; dense ones' hold every block
    dense_blocks = -(-geometry.first_sparse_position(length - 1) // geometry.block_size)
    lists = 4 * config.num_key_value_heads * tokens * (geometry.num_selected + dense_blocks)
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim * itemsize * chunk
    return max(CUDA_MIXER_WIDTHS * width, CUDA_CHOICE_WIDTHS * width + scores + lists) + keys_and_values


def _mixer_bytes(config: MiniCPMSALAConfig, kind: str, itemsize: int, length: int, chunk: int, device: str) -> int:
    assert config.head_dim is not None and config.lightning_head_dim is not None and config.lightning_nh is not None
    operator: str = KINDS[kind].operator
    if operator == "infllm" and length <= config.sparse_geometry.first_sparse_position(length - 1):
        operator = "dense"
    backend = explain(operator, device)[0]
    if operator == "lightning":
        width = config.lightning_nh * config.lightning_head_dim
    else:
        width = config.num_attention_heads * config.head_dim
    size = MIXER_WIDTHS[operator][backend] * width * itemsize * chunk
    if operator == "dense" and backend == "eager" and length > chunk:
        # the mask of a tile of queries that have keys before them, and a copy inside torch
        size += 2 * itemsize * min(MASK_ELEMENTS, min(TILE_QUERIES, chunk) * length)
    return size


def _selection_bytes(config: MiniCPMSALAConfig, length: int) -> int:
    """Return what choosing blocks takes for one tile of queries: the only work that grows with the length."""
    if not runs(config.mixer_types, "infllm"):
        return 0
    assert config.num_key_value_heads is not None
    num_blocks = length // config.sparse_geometry.block_size
    # a float32 score, its int64 rank, and what a sort makes of it
    return SELECT_QUERIES * config.num_key_value_heads * num_blocks * (4 + 3 * 8)


def _machine_bytes(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: all there is, for want of what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _group_bytes(root: Path) -> list[int]:
    """Return what is left of each memory limit of this process's control groups (version 2, and 1's own hierarchy)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = base / path.lstrip("/")
        # inside a container the path may be the host's, and only the base is there
        for folder in {base, group, *(parent for parent in group.parents if base in parent.parents)}:
            limit, used = _number(folder / names[0]), _number(folder / names[1])
            if limit is not None and used is not None:
                left.append(max(0, limit - used + _reclaimable(folder / "memory.stat")))
    return left


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def _reclaimable(statistics: Path) -> int:
    """Return the bytes of file pages that count as used but are given up when memory is short."""
    try:
        lines = statistics.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
