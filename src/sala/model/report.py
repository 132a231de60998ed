"""What a checkpoint is, without reading its weights: layers, parameters, memory of its cache, who else can load it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sala.model.cache import AttentionCache, LayerCache, LightningCache, SparseCache, compression_tiers
from sala.model.checkpoint import find_checkpoint, has_place, require_all, shapes_stored, table_of_contents
from sala.model.config import FULL_ROWS, LATENT_ROWS, MiniCPMSALAConfig
from sala.model.decoder import MiniCPMSALAForCausalLM
from sala.model.families import load_config
from sala.model.mixers import MIXERS
from sala.ops.dispatch import explain
from sala.ops.infllm import num_windows

STATE_BYTES = torch.float32.itemsize
# lengths that `cache_bytes` is reported at
LENGTHS = {"128K": 128 * 1024, "1M": 1024 * 1024}

# the operator behind what a layer remembers
OPERATORS: dict[Callable[..., LayerCache], str] = {
    AttentionCache: "dense",
    SparseCache: "infllm",
    LightningCache: "lightning",
}
# parameters of a layer by the mixer that they belong to
MIXER_KINDS = {
    "attention": "full attention",
    "latent-attention": "full latent attention",
    "minicpm4": "sparse attention",
    "latent-minicpm4": "sparse latent attention",
    "lightning-attn": "lightning attention",
}


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
    caches = {MIXERS[mixer].cache for mixer in config.mixer_types}
    operators = [operator for cache, operator in OPERATORS.items() if cache in caches]
    return Report(
        folder=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        mixer_types=tuple(config.mixer_types),
        parameters=parameters_by_kind(config),
        cache_bytes_per_token=cache_bytes_per_token(config, itemsize),
        state_bytes=cache_bytes(config, 0, itemsize),
        cache_bytes={label: cache_bytes(config, length, itemsize) for label, length in LENGTHS.items()},
        backends={operator: explain(operator, device) for operator in operators},
        sglang=sglang_obstacles(config),
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
    """Return the number of parameters, tied ones once."""
    return sum(shape.numel() for shape in network_shapes(config).values())


def parameters_by_kind(config: MiniCPMSALAConfig) -> dict[str, int]:
    """Return the number of parameters of embeddings and head, MLPs, each kind of mixer, and the norms between them."""
    mixers = config.mixer_types
    kinds = (
        {"embeddings": 0, "mlp": 0} | {MIXER_KINDS[name]: 0 for name in MIXER_KINDS if name in mixers} | {"norms": 0}
    )
    for name, shape in network_shapes(config).items():
        if "embed_tokens" in name or name.startswith("lm_head"):
            kind = "embeddings"
        elif ".mlp." in name:
            kind = "mlp"
        elif ".self_attn." in name:
            kind = MIXER_KINDS[mixers[int(name.split(".")[2])]]
        else:
            kind = "norms"
        kinds[kind] += shape.numel()
    return kinds


def _keys_and_values(config: MiniCPMSALAConfig, length: int, itemsize: int) -> int:
    assert config.num_key_value_heads is not None and config.head_dim is not None
    return 2 * length * config.num_key_value_heads * config.head_dim * itemsize


def _sparse(config: MiniCPMSALAConfig, length: int, itemsize: int) -> int:
    assert config.num_key_value_heads is not None and config.head_dim is not None
    windows = sum(num_windows(length, size, stride) for size, stride in compression_tiers(config.sparse_geometry))
    return (
        _keys_and_values(config, length, itemsize) + windows * config.num_key_value_heads * config.head_dim * itemsize
    )


def _state(config: MiniCPMSALAConfig, length: int, itemsize: int) -> int:
    assert config.lightning_nh is not None and config.lightning_head_dim is not None
    value_width = config.v_head_dim or config.lightning_head_dim
    return config.lightning_nh * config.lightning_head_dim * value_width * STATE_BYTES


# what a layer of each kind of cache holds after `length` tokens
CACHE_BYTES: dict[Callable[..., LayerCache], Callable[[MiniCPMSALAConfig, int, int], int]] = {
    AttentionCache: _keys_and_values,
    SparseCache: _sparse,
    LightningCache: _state,
}


def cache_bytes(config: MiniCPMSALAConfig, length: int, itemsize: int) -> int:
    """Return the bytes that the cache of one sequence holds after `length` tokens; at 0 what does not grow: the states."""
    return sum(CACHE_BYTES[MIXERS[name].cache](config, length, itemsize) for name in config.mixer_types)


def cache_parts(config: MiniCPMSALAConfig, length: int, itemsize: int) -> dict[str, int]:
    """Return `cache_bytes` by what it is for: keys and values, compressed keys, states."""
    kinds = [MIXERS[name].cache for name in config.mixer_types]
    states = kinds.count(LightningCache) * _state(config, length, itemsize)
    keys_and_values = (len(kinds) - kinds.count(LightningCache)) * _keys_and_values(config, length, itemsize)
    rest = cache_bytes(config, length, itemsize) - keys_and_values - states
    return {"keys and values": keys_and_values, "compressed keys": rest, "states": states}


def cache_bytes_per_token(config: MiniCPMSALAConfig, itemsize: int) -> float:
    """Return the growth of the cache by a token, in the long run: compressed keys come once a stride."""
    # a length that every stride divides counts whole windows
    period = 2
    if not FULL_ROWS.keys().isdisjoint(config.mixer_types):
        period = config.sparse_geometry.coarse_stride * config.sparse_geometry.coarse_size
    return (cache_bytes(config, 2 * period, itemsize) - cache_bytes(config, period, itemsize)) / period


def sglang_obstacles(config: MiniCPMSALAConfig) -> tuple[str, ...]:
    """Return why SGLang's MiniCPM-SALA model cannot run a checkpoint of this configuration as it is.

    Read from its sources (models/minicpm.py, configs/minicpm.py and layers/attention/minicpm/ of pull request 30360):
    what stops it, and what it would leave out or compute otherwise without a word.
    """
    assert config.num_key_value_heads is not None
    mixers = set(config.mixer_types)
    softmax, sparse, linear = mixers & {"attention", "minicpm4"}, "minicpm4" in mixers, "lightning-attn" in mixers
    heads_a_group = config.num_attention_heads // config.num_key_value_heads
    geometry = config.sparse_geometry if sparse else None
    obstacles = {
        "it has no latent attention; some mixer_types are "
        f"{', '.join(sorted(mixers & set(LATENT_ROWS)))}": not mixers.isdisjoint(LATENT_ROWS),
        "its attention has no q/k norm; attention_qk_norm is True": softmax and config.attention_qk_norm,
        "it has no biases; attention_bias, qkv_bias or mlp_bias is True": config.attention_bias
        or config.qkv_bias
        or config.mlp_bias,
        f"it does not scale logits by position; attn_logits_scaling is {config.attn_logits_scaling}": softmax
        and config.attn_logits_scaling is not None,
        f"its attention heads are hidden_size / num_attention_heads wide; head_dim is {config.head_dim}": softmax
        and config.head_dim != config.hidden_size // config.num_attention_heads,
        f"its linear layers have a key/value head for every query head; lightning_nkv is {config.lightning_nkv}, "
        f"lightning_nh {config.lightning_nh}": linear and config.lightning_nkv != config.lightning_nh,
        "it runs every attention layer block-sparse beside a sparse_config; some mixer_types are 'attention'": "attention"
        in mixers
        and config.sparse_config is not None,
    }
    if geometry is not None:
        obstacles |= {
            f"its sparse kernels take 16 query heads a key/value head; there are {heads_a_group}": heads_a_group != 16,
            f"its sparse kernels take heads of 128; head_dim is {config.head_dim}": config.head_dim != 128,
            "its kernels pool keys in windows of 32, 16 apart; kernel_size and kernel_stride are "
            f"{geometry.kernel_size} and {geometry.kernel_stride}": (geometry.kernel_size, geometry.kernel_stride)
            != (32, 16),
            f"its kernels read blocks of 64 tokens; block_size is {geometry.block_size}": geometry.block_size != 64,
            "it normalises scores by the coarse windows; normalizer is 'exact'": geometry.normalizer == "exact",
        }
    return tuple(reason for reason, holds in obstacles.items() if holds)
