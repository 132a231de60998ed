"""Fields of a config.json that the network has no place for: those that change nothing, and those that must say so.

transformers writes every attribute of a configuration, and tools leave their own. What is not known and says something is refused:
it may change the numbers.
"""

import functools
import logging
from collections.abc import Collection, Mapping
from typing import Any

from transformers import GenerationConfig

from sala.errors import CheckpointError, SalaError, nearest

logger = logging.getLogger("sala")

# says how weights are packed
QUANTISATION = "quantization_config"

# in nearly every file, and without a part in the forward pass: not worth a line
COMMON = frozenset(
    {
        "architectures",
        "attn_implementation",
        "auto_map",
        "chunk_size_feed_forward",  # how many rows an MLP takes at once
        "dtype",
        "experts_implementation",
        "id2label",
        "label2id",
        "model_type",
        "mup_denominator",  # in the released MiniCPM files, read by no implementation
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",  # matrix products in parts: another rounding of the same numbers, and transformers does not read it
        "problem_type",
        "rand_init",  # how training began
        "return_dict",
        "torch_dtype",
        "transformers_version",
    }
)

# seen in published checkpoints, left by tools: one line says that they are left out
HARMLESS = frozenset(
    {
        "cls_token_id",
        "decoder_start_token_id",
        "internal_version",
        "is_decoder",
        "is_llama_config",
        "mask_token_id",
        "max_sequence_length",
        "model_max_length",
        "sep_token_id",
        "seq_length",
        "tokenizer_class",
        "transformers.js_config",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
    }
)

# the one value that says what the network does; a field without a value says nothing
ONE_VALUE: Mapping[str, Any] = {
    "add_cross_attention": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1,
    "rope_interleaved": False,
    "shift_labels": True,
    "use_mrope": False,
}

# of a `rope_parameters` or `rope_scaling`, over all kinds of rotation
ROPE_FIELDS = frozenset(
    {
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "factor",
        "finetuned",  # what YaRN was used for
        "high_freq_factor",
        "long_factor",
        "low_freq_factor",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "rope_theta",
        "rope_type",
        "short_factor",
        "truncate",
        "type",
    }
)


def check_fields(
    fields: Mapping[str, Any], known: Collection[str], what: str, error: type[SalaError] = CheckpointError
) -> None:
    """Refuse fields beyond the `known` ones that may change the numbers; say in one line which others are left out.

    what: the fields are of, for messages.

    Raises:
        SalaError: of the kind `error`.
    """
    left_out = []
    for name, value in fields.items():
        if name == QUANTISATION and value is not None and name not in known:
            method = value.get("quant_method") if isinstance(value, Mapping) else value
            raise error(
                f"{QUANTISATION} of method {method!r} in {what}; expected null, for weights that are not packed"
            )
        if name in ONE_VALUE and value is not None and value != ONE_VALUE[name]:
            raise error(f"{name} = {value!r} in {what}; expected {ONE_VALUE[name]!r}")
        if name in known or name in COMMON or name in ONE_VALUE or name.startswith("_"):
            continue
        if name in HARMLESS or name in _of_generation() or says_nothing(value):
            left_out.append(name)
            continue
        raise error(
            f"unknown field {name!r} = {value!r} in {what}{nearest(name, known)}; expected none, or take it out of the file "
            "if it means nothing"
        )
    if left_out:
        say_once(f"fields of {what} that change nothing here are left out: {', '.join(sorted(left_out))}")


def says_nothing(value: Any) -> bool:
    """Return whether a field is off: null, false or empty. A zero is a number."""
    return value is None or value is False or (isinstance(value, str | list | tuple | dict) and not value)


def check_rope(scaling: Mapping[str, Any] | None, what: str, error: type[SalaError] = CheckpointError) -> None:
    """Raise `error` when a rotation has a field that no kind of rotation here reads."""
    for name, value in (scaling or {}).items():
        if name == "partial_rotary_factor" and value == 1:
            continue
        if name not in ROPE_FIELDS and not says_nothing(value):
            raise error(f"unknown field {name!r} = {value!r} in {what}{nearest(name, ROPE_FIELDS)}")


@functools.cache
def _of_generation() -> frozenset[str]:
    """Return the names of options of generation, which older files have beside the shape; transformers drops them too."""
    return frozenset(GenerationConfig._get_default_generation_params())


@functools.cache
def say_once(line: str) -> None:
    """Log a line about a configuration, which a command may read several times."""
    logger.info(line)
