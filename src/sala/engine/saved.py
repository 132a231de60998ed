"""Documents that were read once, as files: the text, its tokens, and all that the layers remember of them.

A file is safetensors. Its metadata say which weights, tokenizer and configuration read it, and a checksum of each tensor.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sala.engine.prompt import join
from sala.engine.runner import Extension, Keys, Runner, States
from sala.engine.runner import Sequence as ReadSequence
from sala.errors import InputError, writing
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, SalaCache
from sala.model.mixers import config_fields
from sala.model.report import cache_bytes

FORMAT = "sala-document-1"
SUFFIX = ".sala"
TEXT, IDS = "text", "ids"
# two starts of a question that no tokenizer joins to the text in one way
QUESTIONS = ("a", "[")


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads: a document is good for the same reader only.

    weights, tokenizer: hashes. configuration: fields that the numbers depend on, the dtype and the page size among them.
    """

    weights: str
    tokenizer: str
    configuration: str

    def differs(self, metadata: Mapping[str, str]) -> str | None:
        """Return what is other in a file's metadata, None when nothing is."""
        for name in ("weights", "tokenizer"):
            if metadata.get(name) != getattr(self, name):
                return f"it was read by other {name}" if name == "weights" else f"it was read with another {name}"
        theirs, ours = json.loads(metadata.get("configuration", "{}")), json.loads(self.configuration)
        other = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
        return f"it was read with other values of {', '.join(other)}" if other else None


@dataclass(frozen=True, slots=True)
class SavedDocument:
    """A text and what the layers remember of its first tokens: `keys` and `states` after all of `ids`."""

    text: str
    ids: tuple[int, ...]
    keys: Keys
    states: States


def reader_of(runner: Runner, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """Return who a runner is. Reads all weights once."""
    config = _plain(runner.config)
    config |= {"dtype": str(runner.model.dtype), "page_size": runner.page_size}
    backend = tokenizer.backend_tokenizer.to_str()
    return Reader(
        weights=_weights_hash(runner.model.state_dict()),
        tokenizer=hashlib.sha256(backend.encode()).hexdigest(),
        configuration=json.dumps(config, sort_keys=True, default=str),
    )


def read_document(
    runner: Runner,
    text: str,
    encode: Callable[[str], list[int]],
    *,
    chunk: int,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> SavedDocument:
    """Read a text for questions that come after it.

    encode: makes the ids of a text and a question together. on_tokens: called after each chunk with its size.

    Raises:
        InputError: the text has no full page.
    """
    one, other = (encode(join(text, question)) for question in QUESTIONS)
    common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    length = common // runner.page_size * runner.page_size
    if not length:
        raise InputError(
            f"the text has {common} tokens; expected at least {runner.page_size}, fewer are read in no time"
        )
    ids = tuple(one[:length])
    sequence = runner.open(length)
    for start in range(0, length, chunk):
        part = ids[start : start + chunk]
        runner.extend([Extension(sequence, part)])
        on_tokens(len(part))
    return SavedDocument(text, ids, runner.keys(sequence, 0, length), runner.states(sequence))


def opened(document: SavedDocument, runner: Runner, prompt: Sequence[int], reserve: int) -> ReadSequence:
    """Return a sequence that has read a document, for a prompt that begins with it.

    Raises:
        InputError: the prompt begins otherwise.
    """
    if tuple(prompt[: len(document.ids)]) != document.ids or len(prompt) <= len(document.ids):
        raise InputError(
            "the prompt does not begin with the document's tokens; expected the options it was read with (--chat)"
        )
    return runner.restore(document.ids, [document.keys], document.states, reserve)


def saved_text(path: Path) -> str:
    """Return the text of a saved document; nothing else of the file is read.

    Raises:
        InputError: there is none, or it is no document.
    """
    with _reading(path) as file:
        return _text(file.get_tensor(TEXT))


def open_cache(
    path: Path,
    network: MiniCPMSALAForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    reserve: int,
) -> SalaCache:
    """Return a cache that has read a saved document, with room for `reserve` tokens; `prompt` begins with its tokens.

    Raises:
        InputError: as `load_document` and `opened`.
    """
    runner = Runner(network)
    document = load_document(path, runner, reader_of(runner, tokenizer))
    return opened(document, runner, prompt, reserve).cache


def save_document(path: Path, document: SavedDocument, reader: Reader) -> None:
    """Write a document beside its place and rename it: there is all of it, or what was there before.

    Raises:
        DiskError: it cannot be written.
    """
    tensors = {
        TEXT: torch.frombuffer(bytearray(document.text.encode()), dtype=torch.uint8),
        IDS: torch.tensor(document.ids, dtype=torch.int64),
    }
    for index, (layer, state) in enumerate(zip(document.keys.tensors, document.states.tensors, strict=True)):
        tensors |= {f"layers.{index}.{place}": tensor for place, tensor in enumerate(layer)}
        if state is not None:
            tensors[f"layers.{index}.state"] = state
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "weights": reader.weights,
        "tokenizer": reader.tokenizer,
        "configuration": reader.configuration,
        "checksums": json.dumps(_checksums(tensors)),
    }
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.parent / f".{path.name}.{uuid4().hex[:8]}"
        try:
            save_file(tensors, aside, metadata)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                aside.unlink()
            raise


def load_document(path: Path, runner: Runner, reader: Reader) -> SavedDocument:
    """Read a document back.

    Raises:
        InputError: there is none, it is damaged, or another reader wrote it.
    """
    with _reading(path) as file:
        metadata = file.metadata()
        if (other := reader.differs(metadata)) is not None:
            raise InputError(f"{str(path)!r}: {other}; expected a document that this model read")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if _checksums(tensors) != json.loads(metadata["checksums"]):
            raise InputError(f"{str(path)!r} is damaged: a checksum differs; expected it as it was written")
        return _assemble(tensors, runner)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a saved document; what is wrong with it is said in one line."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise InputError(f"{str(path)!r} is no saved document; expected a file of `sala read --save`")
            yield file
    except FileNotFoundError as error:
        raise InputError(f"no file {str(path)!r}; expected a document of `sala read --save`") from error
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{str(path)!r} cannot be read ({reason}); expected a document of `sala read --save`"
        ) from error


def _text(tensor: Tensor) -> str:
    return bytes(tensor.numpy()).decode()


def _assemble(tensors: Mapping[str, Tensor], runner: Runner) -> SavedDocument:
    ids = tuple(tensors[IDS].tolist())
    device, dtype, length = runner.model.device, runner.model.dtype, len(ids)
    layers, states = [], []
    for index in range(runner.config.num_hidden_layers):
        prefix = f"layers.{index}."
        state = tensors.get(prefix + "state")
        states.append(None if state is None else state.to(device))
        names = [f"{prefix}{place}" for place in range(4) if f"{prefix}{place}" in tensors]
        layers.append(tuple(tensors[name].to(device) for name in names))
    keys, kept = Keys(0, length, tuple(layers)), States(length, tuple(states))
    size = cache_bytes(runner.config, length, dtype.itemsize)
    if length % runner.page_size or keys.size_bytes + kept.size_bytes != size:
        raise ValueError(f"{keys.size_bytes + kept.size_bytes:,} bytes for {length:,} tokens, not {size:,}")
    return SavedDocument(_text(tensors[TEXT]), ids, keys, kept)


def _plain(config: MiniCPMSALAConfig) -> dict[str, object]:
    """Return the fields that the network's numbers depend on."""
    left_out = {"architectures", "dtype", "use_cache", "initializer_range", "attention_dropout", "auto_map"}
    return {name: value for name, value in config_fields(config).items() if name not in left_out}


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(tensors, pool.map(_checksum, tensors.values()), strict=True))


def _checksum(tensor: Tensor) -> int:
    array = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    # a shape of another order has the same bytes
    return zlib.crc32(array.data if array.size else b"", zlib.crc32(str(tuple(tensor.shape)).encode()))


def _weights_hash(weights: Mapping[str, Tensor]) -> str:
    names = sorted(weights)
    sums = _checksums({name: weights[name] for name in names})
    facts = [(name, str(weights[name].dtype), sums[name]) for name in names]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
