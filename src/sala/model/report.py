"""What a checkpoint is, without reading its weights: layers, parameters, memory of its cache, who else can load it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sala.model.cache import AttentionCache, LightningCache
from sala.model.checkpoint import find_checkpoint, has_place, read_fields, require_all, shapes_stored, table_of_contents
from sala.model.config import MiniCPMSALAConfig
from sala.model.decoder import MiniCPMSALAForCausalLM
from sala.model.families import load_config
from sala.model.kinds import KINDS, runs
from sala.model.mixers import MIXERS, config_fields
from sala.model.packing import packed_modules
from sala.model.sglang import why_not_sglang
from sala.ops.dispatch import explain

# lengths that `cache_bytes` is reported at
LENGTHS = {"128K": 128 * 1024, "1M": 1024 * 1024}


@dataclass(frozen=True, slots=True)
class Report:
    """A checkpoint's facts; bytes are for one sequence in the checkpoint's dtype.

    backends: operator -> (backend that "auto" takes here, why).
    sglang: why SGLang's MiniCPM-SALA model cannot run it, or would compute something else; empty when it can.
    """

    folder: str
    dtype: str
    mixer_types: tuple[str, ...]
    parameters: dict[str, int]
    cache_bytes_per_token: float
    state_bytes: int
    cache_bytes: dict[str, int]
    backends: dict[str, tuple[str, str]]
    sglang: tuple[str, ...]

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_parameters": self.total_parameters}


def inspect(name: str | Path) -> Report:
    """Return the facts of a checkpoint: a folder, a GGUF file, a hub name or a model of the package.

    Raises:
        CheckpointError: files are missing or truncated, or a tensor has another name or shape than the network.
    """
    folder = find_checkpoint(name)
    config = load_config(folder)
    check_tensors(folder, config)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    itemsize = dtype.itemsize
    device = "cuda" if torch.cuda.is_available() else "cpu"
    operators = {KINDS[mixer].operator for mixer in config.mixer_types}
    return Report(
        folder=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        mixer_types=tuple(config.mixer_types),
        parameters=parameters_by_kind(config),
        cache_bytes_per_token=cache_bytes_per_token(config, itemsize),
        state_bytes=cache_bytes(config, 0, itemsize),
        cache_bytes={label: cache_bytes(config, length, itemsize) for label, length in LENGTHS.items()},
        backends={operator: explain(operator, device) for operator in sorted(operators)},
        sglang=why_not_sglang(config, read_fields(folder)),
    )


def network_shapes(config: MiniCPMSALAConfig) -> dict[str, torch.Size]:
    """Return the name and shape of every tensor that a checkpoint of this configuration stores."""
    with torch.device("meta"):
        return shapes_stored(MiniCPMSALAForCausalLM(config))


def check_tensors(folder: Path, config: MiniCPMSALAConfig) -> None:
    """Compare the shards' own tables of contents with the network; the weights are not read.

    Raises:
        CheckpointError: a shard is missing or truncated; a tensor is missing, unknown or of another shape.
    """
    shapes = network_shapes(config)
    found = {name for path, name, shape in table_of_contents(folder) if has_place(name, shape, shapes, path)}
    require_all(found, shapes, folder)


def num_parameters(config: MiniCPMSALAConfig) -> int:
    """Return the number of parameters, tied ones once; of packed weights the bfloat16 numbers that take as much memory."""
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM(config)
    packed = sum(
        buffer.numel() * buffer.element_size() for _, part in packed_modules(model) for buffer in part.buffers()
    )
    return sum(parameter.numel() for parameter in model.parameters()) + packed // torch.bfloat16.itemsize


def parameters_by_kind(config: MiniCPMSALAConfig) -> dict[str, int]:
    """Return the number of parameters of embeddings and head, MLPs, each kind of mixer, and the norms between them."""
    mixers = config.mixer_types
    kinds = (
        {"embeddings": 0, "mlp": 0} | {kind.label: 0 for name, kind in KINDS.items() if name in mixers} | {"norms": 0}
    )
    unpacked = MiniCPMSALAConfig(**(config_fields(config) | {"packing": None}))
    for name, shape in network_shapes(unpacked).items():
        if "embed_tokens" in name or name.startswith("lm_head"):
            kind = "embeddings"
        elif ".mlp." in name:
            kind = "mlp"
        elif ".self_attn." in name:
            kind = KINDS[mixers[int(name.split(".")[2])]].label
        else:
            kind = "norms"
        kinds[kind] += shape.numel()
    return kinds


def cache_bytes(config: MiniCPMSALAConfig, length: int, itemsize: int) -> int:
    """Return the bytes that the cache of one sequence holds after `length` tokens; at 0 what does not grow: the states."""
    return sum(MIXERS[name].cache.bytes_after(config, length, itemsize) for name in config.mixer_types)


def cache_parts(config: MiniCPMSALAConfig, length: int, itemsize: int) -> dict[str, int]:
    """Return `cache_bytes` by what it is for: keys and values, compressed keys, states."""
    linear = [KINDS[name].operator == "lightning" for name in config.mixer_types]
    states = sum(linear) * LightningCache.bytes_after(config, length, itemsize) if any(linear) else 0
    full = (len(linear) - sum(linear)) * AttentionCache.bytes_after(config, length, itemsize)
    rest = cache_bytes(config, length, itemsize) - full - states
    return {"keys and values": full, "compressed keys": rest, "states": states}


def cache_bytes_per_token(config: MiniCPMSALAConfig, itemsize: int) -> float:
    """Return the growth of the cache by a token, in the long run: compressed keys come once a stride."""
    # a length that every stride divides counts whole windows
    period = 2
    if runs(config.mixer_types, "infllm"):
        period = config.sparse_geometry.coarse_stride * config.sparse_geometry.coarse_size
    return (cache_bytes(config, 2 * period, itemsize) - cache_bytes(config, period, itemsize)) / period
