"""Shapes by name: the released models, pairs scaled down from them, and small shapes of the operators alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, Qwen3Config

from sala.errors import InputError, nearest
from sala.model import MiniCPMSALAConfig
from sala.model.kinds import LIGHTNING
from sala.ops.infllm import SparseGeometry

RELEASED_LAYERS = 32
RELEASED_SPARSE_LAYERS = (0, 9, 16, 17, 22, 29, 30, 31)
RELEASED_SPARSE = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}
# 48 blocks of 16 tokens are read: sparse from 1,024 tokens on
SMALL_GEOMETRY = SparseGeometry(kernel_size=8, kernel_stride=4, block_size=16, window_size=256, topk=32, dense_len=1024)
SMALL_HEADS = 8


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Numbers that decide what a model costs. Heads together are as wide as the model; the MLP is four times as wide."""

    hidden_size: int
    layers: int
    heads: int
    groups: int
    vocab_size: int

    @property
    def width(self) -> int:
        return self.hidden_size // self.heads


# 16 query heads share a key/value head as in the released model, or all of them where there are fewer
HYBRIDS: Mapping[str, ModelShape] = {
    "minicpm-sala-9b": ModelShape(hidden_size=4096, layers=32, heads=32, groups=2, vocab_size=73448),
    "sala-1b": ModelShape(hidden_size=2048, layers=12, heads=16, groups=1, vocab_size=32768),
    "sala-100m": ModelShape(hidden_size=512, layers=16, heads=8, groups=1, vocab_size=32768),
    "sala-10m": ModelShape(hidden_size=256, layers=8, heads=4, groups=1, vocab_size=4096),
}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the operators see of a model: heads, groups (key/value heads) and widths of both kinds of layer."""

    heads: int
    groups: int
    width: int
    lightning_heads: int
    lightning_width: int
    geometry: SparseGeometry


SMALL_SHAPES: Mapping[str, AttentionShape] = {
    f"small-{width}x{group}": AttentionShape(
        SMALL_HEADS, SMALL_HEADS // group, width, SMALL_HEADS, width, SMALL_GEOMETRY
    )
    for width in (32, 64)
    for group in (2, 4, 8)
}


def sparse_layers(layers: int) -> tuple[int, ...]:
    """Return which of `layers` are block-sparse: a quarter of them, where the released model has them."""
    count, released = layers // 4, RELEASED_SPARSE_LAYERS
    picked = [released[round(i * (len(released) - 1) / max(1, count - 1))] for i in range(count)]
    return tuple(round(layer * (layers - 1) / (RELEASED_LAYERS - 1)) for layer in picked)


def hybrid_config(name: str) -> MiniCPMSALAConfig:
    """Return the configuration of a named hybrid; all but the sizes is the released model's.

    Raises:
        InputError: no hybrid of that name.
    """
    shape = _row(HYBRIDS, name)
    sparse = sparse_layers(shape.layers)
    return MiniCPMSALAConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=4 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.width,
        lightning_nh=shape.heads,
        lightning_nkv=shape.heads,
        lightning_head_dim=shape.width,
        mixer_types=["minicpm4" if layer in sparse else LIGHTNING for layer in range(shape.layers)],
        sparse_config=RELEASED_SPARSE,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=shape.hidden_size // 16,
        initializer_range=0.1,
        # what a benchmark reads need not end where the released model's table of positions does
        max_position_embeddings=2**21,
        bos_token_id=1,
        eos_token_id=2,
    )


def baseline_config(name: str) -> PreTrainedConfig:
    """Return the full-attention model that a named hybrid is compared with.

    Of the released model it is Qwen3-8B, as in the paper. Of a scaled-down one it is a Qwen3 of the same width, depth and
    query heads, four of which share a key/value head as in Qwen3-8B; its MLP is as wide as makes it as large as the hybrid.

    Raises:
        InputError: no hybrid of that name.
    """
    shape = _row(HYBRIDS, name)
    common: dict[str, Any] = {"rope_theta": 1e6, "max_position_embeddings": 2**21, "tie_word_embeddings": False}
    if name == "minicpm-sala-9b":
        return Qwen3Config(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            **common,
        )
    D, groups = shape.hidden_size, max(1, shape.heads // 4)
    # projections of a layer: 5 D^2 in a linear layer; queries, gate and output, keys and values in a sparse one
    sparse = len(sparse_layers(shape.layers))
    hybrid = (shape.layers - sparse) * 5 * D**2 + sparse * (3 * D**2 + 2 * D * shape.groups * shape.width)
    full = shape.layers * (2 * D**2 + 2 * D * groups * shape.width)
    mlp = 4 * D + (hybrid - full) / (3 * D * shape.layers)
    return Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=D,
        intermediate_size=round(mlp / 64) * 64,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=groups,
        head_dim=shape.width,
        **common,
    )


def baseline_name(name: str) -> str:
    return "qwen3-8b" if name == "minicpm-sala-9b" else f"{name}-full-attention"


def attention_shape(name: str) -> AttentionShape:
    """Return the operators' shape of a named hybrid, or one of the small ones.

    Raises:
        InputError: no shape of that name.
    """
    if name in SMALL_SHAPES:
        return SMALL_SHAPES[name]
    if name not in HYBRIDS:
        _row({**HYBRIDS, **SMALL_SHAPES}, name)
    config = hybrid_config(name)
    assert config.num_key_value_heads is not None and config.head_dim is not None
    assert config.lightning_nh is not None and config.lightning_head_dim is not None
    return AttentionShape(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.lightning_nh,
        config.lightning_head_dim,
        config.sparse_geometry,
    )


def _row(table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise InputError(f"no shape {name!r}; there are {', '.join(table)}{nearest(name, table)}")
    return table[name]
