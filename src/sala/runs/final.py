"""What a finished run leaves: the model, its card, its recipe and, of a conversion, the report."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sala.data import tokenizer_hash
from sala.recipe import Recipe
from sala.runs.card import model_card, versions
from sala.runs.start import Origin
from sala.train.batches import Data
from sala.train.parallel import shadow


def _write_model(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    own, computed = model.config.dtype or torch.float32, torch.float32
    dtype = own if recipe.stored_as is None else getattr(torch, recipe.stored_as)
    stored = model if dtype == computed else shadow(model).to(dtype)
    stored.save_pretrained(folder)
    if recipe.stored_as is not None:
        # its dtype is the one to compute in, whatever the file holds
        stored.config.dtype = computed
        stored.config.save_pretrained(folder)
    model.config.dtype = computed
    tokenizer.save_pretrained(folder)
    recipe.save(folder / "recipe.yaml")


def write_final(
    folder: Path,
    model: Any,
    report: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    data: Data,
    steps: Sequence[Mapping[str, Any]],
    origin: Origin | None,
) -> None:
    """Write a model with its card, tokenizer and recipe, and of a conversion the report."""
    _write_model(folder, model, tokenizer, recipe)
    card = model_card(
        name=recipe.name,
        recipe=recipe.resolved,
        config=model.config.to_dict(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        metrics=steps,
        data=data.describe(),
        tokenizer_sha256=tokenizer_hash(tokenizer),
        versions=versions(),
        teacher=None if origin is None else origin.name,
        base_model=None if origin is None else origin.base_model,
        license=None if origin is None else origin.license,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    if report is not None:
        report.selection.write(folder)
        text = json.dumps(dataclasses.asdict(report), indent=1)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
