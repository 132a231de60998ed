"""Checkpoints, folders or GGUF files: read strictly. Folders are written whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from sala.errors import CheckpointError, InputError, nearest, writing
from sala.model.fetch import FETCHABLE
from sala.model.gguf import SUFFIX, GGUFFile
from sala.model.shipment import assembled, is_shipment

_EMBEDDED = Path(__file__).parent.parent / "embedded"
BUILTIN = {"embedded-teacher": _EMBEDDED / "teacher", "embedded-hybrid": _EMBEDDED / "hybrid"}
# hybrids of fetched teachers that come with the package, put together where they are first asked for
SHIPPED = {folder.name: folder for folder in sorted(_EMBEDDED.iterdir()) if is_shipment(folder)}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ADAPTER = "adapter_config.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def find_checkpoint(name: str | Path, files: Sequence[str] = FILES) -> Path:
    """Return the folder or GGUF file of a checkpoint: one that exists, that ships with the package, was fetched, or of the hub.

    files: patterns of what is fetched from the hub.

    Raises:
        CheckpointError: nothing goes by that name, here or on the hub.
    """
    if str(name) in BUILTIN:
        return BUILTIN[str(name)]
    if str(name) in SHIPPED:
        return assembled(SHIPPED[str(name)])
    # not Path's own, which raises for a name that is too long and for the home of nobody
    folder = Path(os.path.expanduser(name))
    if is_shipment(folder):
        return assembled(folder)
    if os.path.isdir(folder) or (is_gguf(folder) and folder.is_file()):
        return folder
    if str(name) in FETCHABLE:
        if (file := FETCHABLE[str(name)].place).is_file():
            return file
        raise CheckpointError(f"model {str(name)!r} is not on this machine; expected `sala fetch {name}` first")
    looks_like_path = folder.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1
    if not looks_like_path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(str(name), allow_patterns=list(files)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(
                f"model {str(name)!r} is neither a folder nor reachable on the hub ({type(error).__name__})"
            ) from error
    raise CheckpointError(
        f"no folder or GGUF file {str(name)!r}; expected a checkpoint folder, a file that ends in {SUFFIX}, a hub name, or one "
        f"of {', '.join((*BUILTIN, *SHIPPED, *FETCHABLE))}"
    )


def is_gguf(place: Path) -> bool:
    """Return whether a checkpoint is, by its name, a GGUF file and no folder."""
    return place.suffix.lower() == SUFFIX and not os.path.isdir(place)


def is_on_hub(name: str) -> bool:
    """Return whether a name that is a checkpoint's can only be one of the hub."""
    here = {*BUILTIN, *SHIPPED, *FETCHABLE}
    return name not in here and not os.path.exists(os.path.expanduser(name))


def read_fields(place: Path) -> dict:
    """Return the fields of a checkpoint's config.json, of a GGUF file those it amounts to."""
    return GGUFFile(place).fields() if is_gguf(place) else read_json(place / "config.json")


def read_json(path: Path) -> dict:
    """Return a JSON object; CheckpointError when the file is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        files = sorted(str(file) for file in path.parent.glob(f"*{SUFFIX}"))
        hint = f"; expected one, or the name of its file {files[0]}" if files else ""
        raise CheckpointError(f"{path.name} is missing in {path.parent}{hint}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def shard_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, as transformers finds them: one for all, else those of the index.

    Raises:
        CheckpointError: there are none, the index names one that is not there, or an adapter is to be added to them.
    """
    files = _named_shards(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; expected safetensors files, all of the index")
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} has an {ADAPTER}, whose adapter is not in the weights; expected merged weights"
        )
    return files


def _named_shards(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single]
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if not names:
        raise CheckpointError(f"{index} names no files; expected a weight_map")
    return [folder / name for name in names]


@contextlib.contextmanager
def _shard(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error


def read_tensors(place: Path, leave: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every shard; of a GGUF file in float32, without those to `leave`.

    Raises:
        CheckpointError: a shard is missing, truncated or not safetensors.
    """
    if is_gguf(place):
        yield from GGUFFile(place).read(leave)
        return
    for path in shard_files(place):
        with _shard(path) as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                yield name, shard.get_tensor(name)


def table_of_contents(place: Path) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    """Yield (file, name, shape) of every tensor; none is read.

    Raises:
        CheckpointError: a shard is missing, truncated or not safetensors.
    """
    if is_gguf(place):
        yield from ((place, name, shape) for name, shape in GGUFFile(place).shapes())
        return
    for path in shard_files(place):
        with _shard(path) as shard:
            for name in shard.keys():  # noqa: SIM118
                yield path, name, tuple(shard.get_slice(name).get_shape())


def stored_dtype(folder: Path) -> torch.dtype | None:
    """Return the dtype of the first numbers in a folder's files; None where no file has come yet."""
    for path in filter(Path.is_file, _named_shards(folder)):
        with _shard(path) as shard:
            for name in shard.keys():  # noqa: SIM118
                if dtype := FLOATS.get(shard.get_slice(name).get_dtype()):
                    return dtype
    return None


def has_own_head(folder: Path) -> bool:
    """Return whether a folder's files have a head beside the embedding, with other numbers."""
    found: dict[str, Tensor] = {}
    for path in filter(Path.is_file, _named_shards(folder)):
        with _shard(path) as shard:
            found |= {name: shard.get_tensor(name) for name in {HEAD, EMBEDDING} & set(shard.keys())}
    return len(found) == 2 and not torch.equal(found[HEAD], found[EMBEDDING])


def read_generation(place: Path, config: PreTrainedConfig) -> GenerationConfig:
    """Return how a checkpoint wants to be sampled: its generation_config.json, else what its configuration says.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    path = place / "generation_config.json"
    if path.is_file():
        return GenerationConfig.from_dict(read_json(path))
    return GenerationConfig.from_model_config(config)


def shapes_stored(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return the name and shape of every tensor that a checkpoint of the model stores."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def has_place(name: str, shape: Sequence[int], shapes: Mapping[str, torch.Size], where: Path) -> bool:
    """Return whether a stored tensor is read: tables of rotation and copies of a tied head, which old files have, are not.

    shapes: of the network, by name (`shapes_stored`).

    Raises:
        CheckpointError: the network has no tensor of that name, or one of another shape.
    """
    if name not in shapes:
        # transformers computes the first anew too; of a head with other numbers `load_config` says that it is not tied
        if name.endswith("rotary_emb.inv_freq") or name == HEAD:
            return False
        raise CheckpointError(f"tensor {name!r} in {where} has no place in the network{nearest(name, shapes)}")
    if tuple(shape) != tuple(shapes[name]):
        raise CheckpointError(f"tensor {name!r} in {where} has shape {tuple(shape)}; expected {tuple(shapes[name])}")
    return True


def check_whole(name: object, missing: Collection[str], others: Collection[str], known: Collection[str]) -> None:
    """Refuse what transformers has loaded in part: tensors that a checkpoint lacks, or has beyond the network's.

    Raises:
        CheckpointError: there are some; the message names the first.
    """
    if others:
        first = min(others)
        raise CheckpointError(f"tensor {first!r} in {name} has no place in the network{nearest(first, known)}")
    if missing:
        raise CheckpointError(f"{name} lacks {len(missing)} tensors, the first is {min(missing)!r}")


def require_all(found: Collection[str], shapes: Mapping[str, torch.Size], folder: Path) -> None:
    """Raise CheckpointError when a checkpoint lacks tensors of the network."""
    if missing := shapes.keys() - found:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors, the first is {min(missing)!r}")


@contextlib.contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` that takes its name once the block ends without an error.

    What is in it may then be read by whoever may read any new file of this user's: safetensors writes for the user alone.

    Raises:
        InputError: `path` exists already.
        DiskError: it cannot be written, at the start or in the block.
    """
    target = Path(os.path.expanduser(path))
    with writing(target):
        if target.exists():
            raise InputError(f"output {str(target)!r} exists already; expected a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        working = target.parent / f".{target.name}.{uuid4().hex}"
        working.mkdir()
    try:
        with writing(target):
            yield working
            allowed = working.stat().st_mode & 0o666
            for file in working.rglob("*"):
                if file.is_file():
                    file.chmod(file.stat().st_mode | allowed)
            working.rename(target)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
