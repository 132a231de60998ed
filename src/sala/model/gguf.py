"""GGUF files as checkpoints: the fields of a config.json, and tensors by our names, dequantised by the `gguf` package.

llama.cpp defines the format (ggml-org/ggml, docs/gguf.md) and, in its converter, what a Llama's tensors look like in one.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sala.errors import CheckpointError
from sala.model.gguf_packed import KINDS, packed_weight
from sala.ops.quantized import QuantizedWeight

SUFFIX = ".gguf"

# Architectures, with whether llama.cpp stores the rows of q and k in another order (Mistral is a "llama" there).
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False}

# Keys under the architecture's name, to fields of a config.json.
FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
SCALING_FIELDS = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
# Keys that must agree with others, or say nothing of the forward pass.
OTHER_KEYS = frozenset(
    {"vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.finetuned", "attention.causal"}
)

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# How Llama 3's rotation is scaled; a file has its factors alone.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# What quantised weights are computed in unless a caller says otherwise.
QUANTISED_DTYPE = "bfloat16"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GGUFFile:
    """The table of contents of one file.

    Raises:
        CheckpointError: the `gguf` package is missing, the file is damaged, a part of several, or of another architecture.
    """

    def __init__(self, path: Path):
        self.path = path
        stat = path.stat()
        self._said, self.tensors = _open(path, stat.st_mtime_ns, stat.st_size)
        self.architecture: str = self.get("general.architecture")
        if self.get("split.count", 1) > 1:
            raise CheckpointError(
                f"{path} is one of {self.get('split.count')} parts; expected one file (`llama-gguf-split --merge` makes one)"
            )
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"general.architecture = {self.architecture!r} in {path}; expected one of {', '.join(ARCHITECTURES)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """Return what the file says under a key: a number, a string, or a list."""
        return self._said.get(key, default)

    @functools.cached_property
    def own(self) -> dict[str, Any]:
        """What is said under the architecture's own name, by the rest of the key."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self._said.items() if key.startswith(prefix)}

    def fields(self) -> dict[str, Any]:
        """Return the fields of a config.json of the family that the architecture is."""
        self._refuse_unknown()
        for key in ("embedding_length", "block_count", "attention.head_count"):
            if not isinstance(self.own.get(key), int):
                raise CheckpointError(
                    f"{self.architecture}.{key} is {self.own.get(key)!r} in {self.path}; expected a whole number"
                )
        width = self.own.get("attention.key_length", self.own["embedding_length"] // self.own["attention.head_count"])
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.own.get(key, width) != width:
                raise CheckpointError(
                    f"{self.architecture}.{key} = {self.own[key]} in {self.path}; expected the width of a head, {width}"
                )
        theta = self.own.get("rope.freq_base", 10000.0)
        return {
            "model_type": self.architecture,
            **{ours: self.own[key] for key, ours in FIELDS.items() if key in self.own},
            "head_dim": width,
            "vocab_size": self._shape("token_embd.weight")[0],
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "rope_parameters": {"rope_theta": theta, **self._rope_scaling(theta, width)},
            "dtype": self._dtype(),
            **self._biases(),
            **self._special_tokens(),
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name, as ours, and the shape of every tensor."""
        for name in self.tensors:
            if name != ROPE_FACTORS:
                yield renamed(name), self._shape(name)

    def read(self, leave: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the values, float32, of every tensor but those to `leave`, in transformers' order of rows."""
        for name in self.tensors:
            if name != ROPE_FACTORS and renamed(name) not in leave:
                yield renamed(name), torch.from_numpy(self._restore(name, self._values(name)))

    def packed(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """Yield the matrices of linear maps that run in the bits they are stored in."""
        for name, tensor in self.tensors.items():
            if tensor.tensor_type.name in KINDS and len(tensor.shape) == 2 and not name.startswith("token_embd"):
                yield renamed(name), packed_weight(tensor, functools.partial(self._restore, name))

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} lacks the tensor {name!r}")
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def _values(self, name: str) -> NDArray[np.float32]:
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"tensor {name!r} in {self.path} is of type {tensor.tensor_type.name}, which the gguf package cannot "
                "dequantise; expected another quantisation"
            ) from error
        # unquantised values are a window on the file, which nobody may write to
        return np.require(values.reshape(self._shape(name)), np.float32, ["C", "W"])

    def _restore(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """Undo llama.cpp's order of the rows of q and k, whose rotation turns neighbours: (pairs, 2) back to (2, pairs)."""
        kind = name.split(".")[-2]
        if not ARCHITECTURES[self.architecture] or kind not in ("attn_q", "attn_k"):
            return values
        heads = self.own["attention.head_count"]
        if kind == "attn_k":
            heads = self.own.get("attention.head_count_kv", heads)
        pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))

    def _refuse_unknown(self) -> None:
        known = FIELDS.keys() | SCALING_FIELDS.keys() | OTHER_KEYS
        for key, value in self.own.items():
            if value and key not in known:
                raise CheckpointError(
                    f"unknown key '{self.architecture}.{key}' = {value!r} in {self.path}; expected a plain "
                    f"{self.architecture} model"
                )

    def _rope_scaling(self, theta: float, width: int) -> dict[str, Any]:
        scaling = {ours: self.own[key] for key, ours in SCALING_FIELDS.items() if key in self.own}
        if scaling.get("rope_type", "none") == "none":
            scaling = {}
        if ROPE_FACTORS not in self.tensors:
            return scaling
        factors = self._values(ROPE_FACTORS)
        factor = float(factors.max())
        if scaling or not np.allclose(factors, _llama3_factors(theta, width, factor), rtol=1e-4):
            raise CheckpointError(
                f"the factors of {ROPE_FACTORS!r} in {self.path} are not those of Llama 3; expected these, or none"
            )
        return {"rope_type": "llama3", "factor": factor, **LLAMA3}

    def _dtype(self) -> str:
        kinds = {DTYPES.get(t.tensor_type.name, QUANTISED_DTYPE) for t in self.tensors.values() if len(t.shape) > 1}
        return kinds.pop() if len(kinds) == 1 else QUANTISED_DTYPE

    def _biases(self) -> dict[str, bool]:
        # Qwen2 has biases on q, k and v by its nature
        if self.architecture == "qwen2":
            return {}
        found = {"attention_bias": "blk.0.attn_q.bias" in self.tensors, "mlp_bias": "blk.0.ffn_up.bias" in self.tensors}
        return {name: True for name, there in found.items() if there}

    def _special_tokens(self) -> dict[str, Any]:
        ends = [self.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        ends = list(dict.fromkeys(token for token in ends if token is not None))
        return {
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
        }


def renamed(name: str) -> str:
    """Return the name that a tensor of a GGUF file has in transformers; a name that is not known stays."""
    stem, _, end = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{end}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in IN_A_LAYER:
        return f"model.layers.{parts[1]}.{IN_A_LAYER[parts[2]]}.{end}"
    return name


def _llama3_factors(theta: float, width: int, factor: float) -> NDArray[np.float64]:
    """Return what Llama 3 divides each frequency by (transformers' `_compute_llama3_parameters`)."""
    turns = LLAMA3["original_max_position_embeddings"] * theta ** -(np.arange(0, width, 2) / width) / (2 * math.pi)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clip(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


# reading a table of contents takes seconds, and one command asks for it several times
@functools.lru_cache(maxsize=1)
def _open(path: Path, changed_ns: int, size_bytes: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return values and tensors by name. The reader itself, which keeps every token of a vocabulary twice, is let go."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError(f"reading {path} needs `gguf`; install it with pip install 'sala[gguf]'") from error
    open_file: Callable[[Path], Any] = GGUFReader
    try:
        reader = open_file(path)
        values = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise CheckpointError(f"{path} is truncated or not a GGUF file: {error}; expected a whole one") from error
    return values, {tensor.name: tensor for tensor in reader.tensors}
