"""What a run starts from besides its recipe: a checkpoint, a tokenizer, data. Remembered, so that it stays the same."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sala.data import tokenizer_hash
from sala.errors import InputError
from sala.model.checkpoint import is_on_hub
from sala.model.fetch import FETCHABLE
from sala.train.batches import Data

START = "start"

# of each parameter that goes into a checkpoint's fingerprint: enough to tell models apart without reading all of one
NUMBERS = 256


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, for its card: a checkpoint's name, and whether that is one of the hub.

    base_model, license: its name on the hub and its licence, where they are known.
    """

    name: str
    on_hub: bool = False
    base_model: str | None = None
    license: str | None = None

    @classmethod
    def of(cls, name: str) -> "Origin":
        """Return the origin of a checkpoint that a user calls so: a folder or file, one of the package, or one of the hub."""
        if name in FETCHABLE:
            return cls(name, base_model=FETCHABLE[name].base_model, license=FETCHABLE[name].license)
        on_hub = is_on_hub(name)
        return cls(name, on_hub, base_model=name if on_hub else None)


def fingerprint(model: Any) -> str:
    """Return a hash of the names, the shapes and the first numbers of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:NUMBERS].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def start_of(model: Any, origin: Origin | None, tokenizer: PreTrainedTokenizerBase, data: Data) -> dict[str, Any]:
    """Return as JSON what a run starts from; `model` is None for random weights."""
    checkpoint = None
    if model is not None:
        name = None if origin is None else origin.name
        place = None if name is None else _place(name)
        on_hub = origin is not None and origin.on_hub
        checkpoint = {"name": name, "place": place, "on_hub": on_hub, "sha256": fingerprint(model)}
    words = {"name": _place(str(tokenizer.name_or_path)), "sha256": tokenizer_hash(tokenizer)}
    return {"checkpoint": checkpoint, "tokenizer": words, "data": data.describe()}


def _place(name: str) -> str:
    """Return a name that another command understands too, which may stand in another folder."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def require_same_start(there: Mapping[str, Any], here: Mapping[str, Any], run: Path) -> None:
    """Raise InputError when a run that goes on is given another start than its own."""
    for what in ("checkpoint", "tokenizer"):
        theirs, mine = there[what], here[what]
        if (theirs and theirs["sha256"]) != (mine and mine["sha256"]):
            own = "random weights" if theirs is None else repr(theirs["name"])
            raise InputError(
                f"the run in {str(run)!r} started with another {what}; expected its own ({own}), or a new folder"
            )
    for name, description in here["data"].items():
        if (theirs := there["data"].get(name)) != description:
            raise InputError(
                f"the run in {str(run)!r} drew {name!r} from {theirs}; here it is {description}. Expected: its own "
                "data, or a new folder"
            )
