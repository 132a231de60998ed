"""A checkpoint in two steps: what is quick to know first, the weights once it is clear that they fit."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sala.data import load_tokenizer
from sala.engine.memory import check_memory
from sala.errors import InputError, nearest
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.model.checkpoint import BUILTIN, find_checkpoint, read_generation
from sala.model.families import load_config, load_model
from sala.model.report import check_tensors, network_shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
PACKED = "packed"
# of an answer of the models of the package: their tasks ask for two, and what they add is noise
BUILTIN_NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose weights have not been read yet."""

    folder: Path
    config: MiniCPMSALAConfig
    generation: GenerationConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    device: torch.device
    packed: bool = False

    @property
    def num_tensors(self) -> int:
        return len(network_shapes(self.config))


def open_checkpoint(name: str | Path, dtype: str = AUTO, device: str = AUTO) -> Checkpoint:
    """Read configuration, tokenizer and the shards' tables of contents of a checkpoint (see `load_model`).

    dtype: "float32", "bfloat16", "float16", or "auto": the checkpoint's own, float32 for the models of the package. "packed":
        a GGUF file's matrices of 4 and 8 bits as they are stored, on a CPU: less memory and faster decoding, but
        activations are rounded to 8 bits, so answers may differ.
    device: any name of torch's, or "auto" for a GPU where there is one.

    Raises:
        CheckpointError: nothing usable goes by that name.
        InputError: the dtype or device is unknown or not on this machine, or nothing here is packed.
    """
    folder = find_checkpoint(name)
    packed = dtype == PACKED
    if packed and (folder.suffix != ".gguf" or find_device(device).type != "cpu"):
        raise InputError(f"dtype {PACKED!r} with {str(name)!r} on {device}; expected a GGUF file, on a CPU")
    config = load_config(folder)
    check_tensors(folder, config)
    generation = read_generation(folder, config)
    if str(name) in BUILTIN:
        generation.max_new_tokens = BUILTIN_NEW_TOKENS
        # they are stored in half the bytes for the package's size, and were trained and measured in float32
        dtype = "float32" if dtype == AUTO else dtype
    return Checkpoint(
        folder=folder,
        config=config,
        generation=generation,
        tokenizer=load_tokenizer(folder),
        dtype=_dtype(AUTO if packed else dtype, config),
        device=find_device(device),
        packed=packed,
    )


def load(
    checkpoint: Checkpoint, length: int, chunk: int, on_tensor: Callable[[str], None] = lambda name: None
) -> MiniCPMSALAForCausalLM:
    """Return the model with its weights, ready to read `length` tokens in chunks of `chunk`.

    on_tensor: called with the name of every tensor that was read.

    Raises:
        MemoryLimitError: weights and cache would not fit; nothing has been read.
        CheckpointError: the weights are incomplete or of another shape.
    """
    check_memory(checkpoint.config, checkpoint.dtype, checkpoint.device, length, chunk)
    return load_model(
        checkpoint.folder,
        dtype=checkpoint.dtype,
        device=checkpoint.device,
        on_tensor=on_tensor,
        keep_packed=checkpoint.packed,
    )


def _dtype(name: str, config: MiniCPMSALAConfig) -> torch.dtype:
    if name == AUTO:
        return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if name not in DTYPES:
        known = (AUTO, PACKED, *DTYPES)
        raise InputError(f"dtype {name!r} is unknown; expected one of {', '.join(known)}{nearest(name, known)}")
    return DTYPES[name]


def find_device(name: str) -> torch.device:
    """Return the device that goes by one of torch's names, or for "auto" a GPU where there is one.

    Raises:
        InputError: it is not on this machine.
    """
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # a device of tensors without numbers ("meta") has none to give
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} is not on this machine ({reason}); expected cpu, or leave it out") from error
    return device
