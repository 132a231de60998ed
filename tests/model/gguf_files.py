"""Tiny GGUF files, as llama.cpp's converter would write a model of transformers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import PreTrainedModel

from sala.model import gguf as reading


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k as `LlamaModel.permute` of llama.cpp's converter does."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F32",
    *,
    keys: Mapping[str, Any] = {},
    arrays: Mapping[str, np.ndarray] = {},
    pack: Callable[[str, int, int], np.ndarray] | None = None,
) -> Path:
    """Write `model`, its matrices in a kind of GGML's, with more `keys` and tensors; a model of ours is a Llama.

    pack: makes matrices (kind, rows, columns) of any numbers, in place of the model's.
    """
    config = model.config
    architecture = config.model_type if config.model_type in reading.ARCHITECTURES else "llama"
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(getattr(config, "rope_parameters", {"rope_theta": 10000.0})["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(width)
    if width * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if architecture == "llama" and ".q_proj." in name:
            values = permuted(values, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            values = permuted(values, config.num_key_value_heads)
        stored = GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        data = quants.quantize(values, stored) if pack is None or values.ndim == 1 else pack(kind, *values.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=stored)
    for name, values in arrays.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
