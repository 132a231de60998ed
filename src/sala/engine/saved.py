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

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sala.engine.prompt import join
from sala.engine.reading import read
from sala.engine.runner import States, page_tokens
from sala.errors import InputError, writing
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, PagedCache, SalaCache, new_cache
from sala.model.cache import AttentionCache, LightningCache
from sala.model.mixers import config_fields
from sala.model.paged import PagedTensor
from sala.model.report import cache_bytes

FORMAT = "sala-document-1"
SUFFIX = ".sala"
TEXT, IDS = "text", "ids"
Keys = tuple[tuple[Tensor, ...], ...]
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
    """A text and what the layers remember of its first tokens, `ids`.

    keys: by layer keys, values and compressed keys of both tiers, (S or N, G, K); () for a layer that has none.
    """

    text: str
    ids: tuple[int, ...]
    keys: Keys
    states: States


def reader_of(model: MiniCPMSALAForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Reader:
    """Return who a model is. Reads all weights once."""
    config = _plain(model.config)
    config |= {"dtype": str(model.dtype), "page_size": page_tokens(model.config)}
    backend = tokenizer.backend_tokenizer.to_str()
    return Reader(
        weights=_weights_hash(model.state_dict()),
        tokenizer=hashlib.sha256(backend.encode()).hexdigest(),
        configuration=json.dumps(config, sort_keys=True, default=str),
    )


def read_document(
    model: MiniCPMSALAForCausalLM,
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
    page = page_tokens(model.config)
    length = common // page * page
    if not length:
        raise InputError(f"the text has {common} tokens; expected at least {page}, fewer are read in no time")
    ids_1T, nothing = torch.tensor([one[:length]], device=model.device), torch.tensor([], dtype=torch.long)
    cache = new_cache(model.config, reserve=length)
    for _ in read(model, ids_1T, nothing, cache, chunk=chunk, on_tokens=on_tokens):
        pass
    states = tuple(
        layer.state_BHKV[0] if isinstance(layer, LightningCache) and layer.state_BHKV is not None else None
        for layer in cache.of_layers
    )
    keys = tuple(_filled(layer) if isinstance(layer, AttentionCache) else () for layer in cache.of_layers)
    return SavedDocument(text, tuple(one[:length]), keys, States(length, states))


@torch.inference_mode()
def opened(document: SavedDocument, model: MiniCPMSALAForCausalLM, prompt: Sequence[int], reserve: int) -> SalaCache:
    """Return a cache that has read a document, with room for `reserve` tokens, for a prompt that begins with it.

    Raises:
        InputError: the prompt begins otherwise.
    """
    if tuple(prompt[: len(document.ids)]) != document.ids or len(prompt) <= len(document.ids):
        raise InputError(
            "the prompt does not begin with the document's tokens; expected the options it was read with (--chat)"
        )
    cache = new_cache(model.config, reserve)
    for layer, keys, state in zip(cache.of_layers, document.keys, document.states.tensors, strict=True):
        if isinstance(layer, LightningCache):
            layer.state_BHKV = None if state is None else state[None]
        for tensor, kept in zip(layer.tensors(), keys, strict=True):
            tensor.extend_to(kept.shape[0], kept[None])[:] = kept
    cache.read(torch.tensor([document.ids], device=model.device), len(document.ids))
    return cache


def gather(cache: PagedCache, pages: Sequence[int]) -> Keys:
    """Return a copy of what full pages hold, in order."""
    layers: list[tuple[Tensor, ...]] = [() for _ in cache.layers]
    table = np.array(pages, np.int64)
    for index, tensor in cache.tensors():
        assert tensor.buffer is not None
        places = torch.from_numpy(_places(table, tensor, cache)).to(tensor.buffer.device)
        layers[index] += (tensor.buffer.flatten(0, 1)[places],)
    return tuple(layers)


@torch.inference_mode()
def scatter(cache: PagedCache, pages: Sequence[int], keys: Keys) -> None:
    """Write into pages what `gather` returned of others."""
    table = np.array(pages, np.int64)
    rest = [list(layer) for layer in keys]
    for index, tensor in cache.tensors():
        kept = rest[index].pop(0)
        tensor.write(torch.from_numpy(_places(table, tensor, cache)).to(kept.device), kept)


def _places(table: np.ndarray, tensor: PagedTensor, cache: PagedCache) -> np.ndarray:
    """Return the places of a tensor in pages that hold something, counted through all pages.

    A window lies in the page of its last token, so that the first places of a text's first page are empty.
    """
    stride = cache.sizes.page_tokens // tensor.places
    size = next((size for size, each in cache.tiers if each == stride), 1) if stride > 1 else 1
    index = np.arange((size - 1) // stride, len(table) * tensor.places)
    return table[index // tensor.places] * tensor.places + index % tensor.places


def _filled(layer: AttentionCache) -> tuple[Tensor, ...]:
    """Return what a layer holds of its only row."""
    filled = [tensor.filled for tensor in layer.tensors()]
    return tuple(tensor[0] for tensor in filled if tensor is not None)


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
    return opened(load_document(path, network, reader_of(network, tokenizer)), network, prompt, reserve)


def save_document(path: Path, document: SavedDocument, reader: Reader) -> None:
    """Write a document beside its place and rename it: there is all of it, or what was there before.

    Raises:
        DiskError: it cannot be written.
    """
    tensors = {
        TEXT: torch.frombuffer(bytearray(document.text.encode()), dtype=torch.uint8),
        IDS: torch.tensor(document.ids, dtype=torch.int64),
    }
    for index, (layer, state) in enumerate(zip(document.keys, document.states.tensors, strict=True)):
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


def load_document(path: Path, model: MiniCPMSALAForCausalLM, reader: Reader) -> SavedDocument:
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
        return _assemble(tensors, model)


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


def _assemble(tensors: Mapping[str, Tensor], model: MiniCPMSALAForCausalLM) -> SavedDocument:
    ids = tuple(tensors[IDS].tolist())
    device, length, config = model.device, len(ids), model.config
    layers, states = [], []
    for index in range(config.num_hidden_layers):
        prefix = f"layers.{index}."
        state = tensors.get(prefix + "state")
        states.append(None if state is None else state.to(device))
        names = [f"{prefix}{place}" for place in range(4) if f"{prefix}{place}" in tensors]
        layers.append(tuple(tensors[name].to(device) for name in names))
    sizes = [tensor.numel() * tensor.element_size() for layer in layers for tensor in layer]
    found = sum(sizes) + States(length, tuple(states)).size_bytes
    size = cache_bytes(config, length, model.dtype.itemsize)
    if length % page_tokens(config) or found != size:
        raise ValueError(f"{found:,} bytes for {length:,} tokens, not {size:,}")
    return SavedDocument(_text(tensors[TEXT]), ids, tuple(layers), States(length, tuple(states)))


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
