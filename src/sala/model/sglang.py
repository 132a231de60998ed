"""Why SGLang's MiniCPM-SALA model would not run a checkpoint as it is.

Read from the sources of SGLang 0.5.23 (`srt/models/minicpm.py`, `srt/configs/minicpm.py`, `srt/layers/attention/minicpm/`,
`srt/layers/attention/linear/lightning_backend.py`) and from the kernels that they call; not run here.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sala.model.config import MiniCPMSALAConfig
from sala.model.kinds import LATENT_ROWS, LIGHTNING

ARCHITECTURES = ("MiniCPMSALAForCausalLM", "MiniCPMForCausalLM")
# what it takes for a field that config.json leaves out, of those that the network depends on
DEFAULTS: Mapping[str, Any] = {
    "attention_bias": False,
    "attn_use_output_gate": False,
    "attn_use_rope": True,
    "dim_model_base": 256,
    "lightning_scale": "1/sqrt(d)",
    "lightning_use_rope": True,
    "max_position_embeddings": 32768,
    "qk_norm": True,
    "rms_norm_eps": 1e-6,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "tie_word_embeddings": False,
    "use_output_gate": False,
    "use_output_norm": False,
}
SPARSE_FIELDS = ("kernel_size", "kernel_stride", "init_blocks", "block_size", "window_size", "dense_len", "topk")
LINEAR_WIDTH = 128


def why_not_sglang(config: MiniCPMSALAConfig, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what stops SGLang, and what it would leave out or compute otherwise without a word; empty when it can run it.

    fields: of the checkpoint's config.json, as they stand there.
    """
    kind = fields.get("model_type")
    if kind != config.model_type:
        return (f"it takes model_type {config.model_type!r}; config.json says {kind!r}, for another model of SGLang",)
    return (*_of_file(config, fields), *_of_layers(config), *_of_blocks(config, fields))


def _of_file(config: MiniCPMSALAConfig, fields: Mapping[str, Any]) -> Iterator[str]:
    named = fields.get("architectures") or []
    if not set(named) & set(ARCHITECTURES):
        yield f"it is found by architectures {ARCHITECTURES[0]!r}; config.json says {named}"
    for name, default in DEFAULTS.items():
        if name not in fields and getattr(config, name) != default:
            yield f"it takes {name} = {default!r} where config.json does not say; here it is {getattr(config, name)!r}"


def _of_layers(config: MiniCPMSALAConfig) -> Iterator[str]:
    mixers = set(config.mixer_types)
    softmax, linear = mixers & {"attention", "minicpm4"}, LIGHTNING in mixers
    gates = (softmax and config.attn_use_output_gate) or (linear and config.use_output_gate)
    obstacles = {
        f"it has no latent attention; some mixer_types are {', '.join(sorted(mixers & set(LATENT_ROWS)))}": mixers
        & set(LATENT_ROWS),
        "its attention has no q/k norm; attention_qk_norm is True": softmax and config.attention_qk_norm,
        "it has no biases of q, k and v alone, and leaves them out; qkv_bias is True": config.qkv_bias,
        "it has no biases of MLPs, and leaves them out; mlp_bias is True": config.mlp_bias,
        "its gates have biases where attention has, which are not in the checkpoint; attention_bias is True": gates
        and config.attention_bias,
        f"it does not scale logits by position; attn_logits_scaling is {config.attn_logits_scaling}": softmax
        and config.attn_logits_scaling is not None,
        f"its linear layers have a key/value head for every query head; lightning_nkv is {config.lightning_nkv}, "
        f"lightning_nh {config.lightning_nh}": linear and config.lightning_nkv != config.lightning_nh,
        f"its linear layers take widths that {LINEAR_WIDTH} divides; lightning_head_dim is {config.lightning_head_dim}": linear
        and (config.lightning_head_dim or 0) % LINEAR_WIDTH != 0,
        f"it does not know lightning_scale {config.lightning_scale!r}": linear and config.lightning_scale == "1",
        "it runs every attention layer block-sparse beside a sparse_config; some mixer_types are 'attention'": "attention"
        in mixers
        and config.sparse_config is not None,
    }
    return (reason for reason, holds in obstacles.items() if holds)


def _of_blocks(config: MiniCPMSALAConfig, fields: Mapping[str, Any]) -> Iterator[str]:
    if "minicpm4" not in config.mixer_types:
        return iter(())
    assert config.num_key_value_heads is not None
    heads_a_group = config.num_attention_heads // config.num_key_value_heads
    geometry = config.sparse_geometry
    missing = [name for name in SPARSE_FIELDS if name not in (fields.get("sparse_config") or {})]
    reads = max(geometry.dense_len, geometry.block_size * (geometry.topk + geometry.window_size // geometry.block_size))
    obstacles = {
        f"it asks sparse_config for all of its numbers; {', '.join(missing)} are not in config.json": missing,
        f"its sparse kernels take 16 query heads a key/value head; there are {heads_a_group}": heads_a_group != 16,
        f"its sparse kernels take heads of 128; head_dim is {config.head_dim}": config.head_dim != 128,
        "its kernels pool keys in windows of 32, 16 apart; kernel_size and kernel_stride are "
        f"{geometry.kernel_size} and {geometry.kernel_stride}": (geometry.kernel_size, geometry.kernel_stride)
        != (32, 16),
        f"its kernels read blocks of 64 tokens; block_size is {geometry.block_size}": geometry.block_size != 64,
        f"it needs room for {reads:,} tokens to select; max_position_embeddings is {config.max_position_embeddings:,}": reads
        > config.max_position_embeddings,
        "it normalises scores by the coarse windows; normalizer is 'exact'": geometry.normalizer == "exact",
    }
    return (reason for reason, holds in obstacles.items() if holds)


def packing_obstacles(quantization: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return why SGLang would not read packed weights, from a checkpoint's `quantization_config`; empty when it can.

    It joins the projections of a layer (q, k and v; gate and up), and leaves the head as it is.
    """
    if quantization is None:
        return ()
    method, bits = quantization.get("quant_method"), quantization.get("bits")
    obstacles = {
        f"its GPTQ loader was compared, and no other; quant_method is {method!r}": method != "gptq",
        f"its kernels for GPTQ take 4 and 8 bits; bits is {bits}": bits not in (4, 8),
        "its kernels for GPTQ take symmetric weights; sym is False": not quantization.get("sym", True),
        "q, k and v have one order of columns there; desc_act is True": bool(quantization.get("desc_act")),
        "its head is never packed; lm_head is True": bool(quantization.get("lm_head")),
        "it joins q, k and v, and gate and up, which 'dynamic' may pack in different ways": bool(
            quantization.get("dynamic")
        ),
    }
    return tuple(reason for reason, holds in obstacles.items() if holds)
