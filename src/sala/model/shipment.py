"""A hybrid without what it shares with its teacher: its mixers in 8 bits or fewer, and the hash of the file that has the rest.

A folder with a shipment holds `shipment.json`, `mixers.npz` and the small files of a checkpoint (configuration, tokenizer). Where
a checkpoint is looked for, it is put together with the teacher's file once, in the cache.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sala.cache import cache_folder
from sala.errors import CheckpointError, InputError, writing
from sala.model.fetch import FETCHABLE
from sala.model.gguf import GGUFFile

SHIPMENT, MIXERS, WEIGHTS = "shipment.json", "mixers.npz", "model.safetensors"
MIXER = ".self_attn."
# the largest code of a row's largest number, the finest one that fits is taken: fewer levels compress better
LEVELS = (127, 112, 96, 80, 63)


def pack(tensors: Iterable[tuple[str, Tensor]], source: Path, base: str, out: Path, limit_bytes: int) -> dict[str, Any]:
    """Write the shipment of a hybrid into the folder `out`, which exists, and return what stands in its `shipment.json`.

    Args:
        tensors: of the hybrid by name.
        source: the hybrid's folder, whose small files are copied.
        base: the teacher, a name in `FETCHABLE` that was fetched.
        limit_bytes: the most that `mixers.npz` may have.

    Raises:
        InputError: something else than mixers was trained, or they do not fit.
        CheckpointError: the teacher's file is not there.
    """
    theirs = dict(GGUFFile(_base(base)).read())
    mixers: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if MIXER in name:
            mixers[name] = tensor.float()
        elif name not in theirs or not torch.equal(tensor.bfloat16(), theirs[name].bfloat16()):
            raise InputError(
                f"tensor {name!r} is not that of {base}; expected a hybrid of it that trained its mixers only (trainable: mixers)"
            )
    for levels in LEVELS:
        coded = {part: array for name, tensor in mixers.items() for part, array in _coded(name, tensor, levels).items()}
        with writing(out / MIXERS), (out / MIXERS).open("wb") as file:
            np.savez_compressed(file, **coded)
        if (out / MIXERS).stat().st_size <= limit_bytes:
            break
    else:
        size = (out / MIXERS).stat().st_size
        raise InputError(
            f"the mixers take {size / 1e6:.1f} MB in {LEVELS[-1]} levels; expected at most {limit_bytes / 1e6:.1f} MB"
        )
    for small in source.iterdir():
        if small.is_file() and not small.name.startswith("model."):
            shutil.copy(small, out / small.name)
    facts = {"base": base, "base_sha256": FETCHABLE[base].sha256, "levels": levels, "sha256": _sha256(out / MIXERS)}
    (out / SHIPMENT).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def is_shipment(folder: Path) -> bool:
    # not Path.is_file, which raises for a name that no file can have
    return os.path.isfile(folder / SHIPMENT)


def assembled(folder: Path) -> Path:
    """Return the checkpoint folder that a shipment and its teacher's file make, from the cache or made now.

    Raises:
        CheckpointError: the teacher was not fetched, or a file is not the one that was shipped.
        DiskError: the cache cannot be written.
    """
    facts = json.loads((folder / SHIPMENT).read_text(encoding="utf-8"))
    if (found := _sha256(folder / MIXERS)) != facts["sha256"]:
        raise CheckpointError(f"{folder / MIXERS} has sha256 {found}; expected {facts['sha256']}")
    target = cache_folder("models") / f"{folder.name}-{facts['sha256'][:16]}"
    if target.is_dir():
        return target
    base = _base(facts["base"])
    if (found := _sha256(base)) != facts["base_sha256"]:
        raise CheckpointError(
            f"{base} has sha256 {found}; expected {facts['base_sha256']}: fetch {facts['base']} again"
        )
    with writing(target):
        working = Path(tempfile.mkdtemp(dir=target.parent, prefix=".assembling-"))
        try:
            tensors = {name: tensor for name, tensor in GGUFFile(base).read() if MIXER not in name}
            tensors |= _decoded(folder / MIXERS)
            save_file(
                {name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()},
                working / WEIGHTS,
                {"format": "pt"},
            )
            for file in folder.iterdir():
                if file.is_file() and file.name not in (MIXERS, SHIPMENT):
                    shutil.copy(file, working / file.name)
            working.chmod(0o755)
            working.rename(target)
        finally:
            shutil.rmtree(working, ignore_errors=True)
    return target


def _base(name: str) -> Path:
    if name not in FETCHABLE:
        raise InputError(f"base {name!r} cannot be fetched; expected one of {', '.join(FETCHABLE)}")
    if not FETCHABLE[name].place.is_file():
        raise CheckpointError(f"the weights of {name!r} are not on this machine; expected `sala fetch {name}` first")
    return FETCHABLE[name].place


def _coded(name: str, tensor: Tensor, levels: int) -> dict[str, Any]:
    """Return a matrix as whole numbers with a scale a row; a vector as it is."""
    if tensor.ndim != 2:
        return {name: tensor.numpy()}
    scale_R1 = tensor.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / levels
    codes = (tensor / scale_R1).round().to(torch.int8)
    return {f"{name}/codes": codes.numpy(), f"{name}/scale": scale_R1.numpy()}


def _decoded(path: Path) -> dict[str, Tensor]:
    with np.load(path) as stored:
        arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
    tensors = {}
    for part, array in arrays.items():
        name, _, what = part.partition("/")
        if what == "codes":
            tensors[name] = array.float() * arrays[f"{name}/scale"]
        elif not what:
            tensors[name] = array
    return tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
