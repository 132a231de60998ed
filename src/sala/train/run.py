"""Whole runs: a model from scratch, or a conversion around the function that is passed in."""

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase

from sala.errors import InputError, RecipeError, nearest
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.model.checkpoint import output_folder
from sala.train.batches import Corpus, read_corpus
from sala.train.initial import initialize
from sala.train.loop import Observer, Progress, run_stage
from sala.train.recipe import ConversionRecipe, Recipe, Stage, TrainingRecipe

# stages of one run draw different data: each has a seed of its own
SEEDS_PER_RUN = 1000


def ignore(progress: Progress) -> None:
    """The observer that shows nothing."""


@dataclass(frozen=True)
class StageRunner:
    """Runs the stages of one recipe: data, seed, optimizer and record of each."""

    recipe: Recipe
    corpus: Corpus
    observer: Observer
    record: TextIO | None = None

    def check(self) -> None:
        """Raise RecipeError for data that a stage cannot have, before anything is trained."""
        for stage in self.recipe.stages:
            self._batches(stage)

    def __call__(self, model: Any, stage: Stage, *, teacher: Any = None) -> Progress:
        return run_stage(
            model,
            stage,
            self._batches(stage),
            optimizer=self.recipe.optimizer_of(stage),
            observer=self._note,
            teacher=teacher,
            compile_mode=self.recipe.compile,
        )

    def _batches(self, stage: Stage) -> Callable[[int], Any]:
        index = self.recipe.stages.index(stage)
        return self.corpus.batches(stage, self.recipe.seed * SEEDS_PER_RUN + index)

    def _note(self, progress: Progress) -> None:
        if self.record is not None:
            print(json.dumps(dataclasses.asdict(progress)), file=self.record, flush=True)
        self.observer(progress)


def _require_absent(path: Path) -> None:
    """Refuse an output that is there already before hours of work, not after."""
    if path.exists():
        raise InputError(f"output {str(path)!r} exists already; right would be a new folder")


def _write_model(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    stored = copy.deepcopy(model).to(torch.bfloat16) if recipe.stored_as == "bfloat16" else model
    stored.save_pretrained(folder)
    # its dtype is the one to compute in, whatever the file holds
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    recipe.save(folder / "recipe.yaml")


def new_model(recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase) -> MiniCPMSALAForCausalLM:
    """Return a model of the recipe's configuration with random weights of its seed; `vocab_size` fits the tokenizer."""
    known = set(MiniCPMSALAConfig.__annotations__)
    for name in recipe.model:
        if name not in known:
            raise RecipeError(f"model.{name}: unknown key{nearest(name, known)}")
    torch.manual_seed(recipe.seed)
    defaults = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = MiniCPMSALAForCausalLM(MiniCPMSALAConfig(**(defaults | recipe.model)))
    initialize(model, recipe.init)
    return model


def train(
    recipe: TrainingRecipe,
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus | None = None,
    observer: Observer = ignore,
    model: MiniCPMSALAForCausalLM | None = None,
) -> MiniCPMSALAForCausalLM:
    """Run a training recipe into the folder `out` and return the model.

    `out/metrics.jsonl` has one line a step from the start; `out/final`, the Hugging Face folder with tokenizer and
    resolved recipe, appears when everything is done.

    Args:
        model: trained instead of a new one, when given.

    Raises:
        InputError: `out` exists already.
        RecipeError: a stage cannot run.
    """
    _require_absent(out)
    model = new_model(recipe, tokenizer) if model is None else model
    corpus = read_corpus(tokenizer) if corpus is None else corpus
    StageRunner(recipe, corpus, observer).check()
    out.mkdir(parents=True)
    recipe.save(out / "recipe.yaml")
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as record:
        runner = StageRunner(recipe, corpus, observer, record)
        for stage in recipe.stages:
            runner(model, stage)
    with output_folder(out / "final") as folder:
        _write_model(folder, model, tokenizer, recipe)
    return model


def run_conversion(
    recipe: ConversionRecipe,
    teacher: Any,
    out: Path | None,
    *,
    halo: Callable[..., tuple[Any, Any]],
    score_recall: Callable[[Any], float],
    score_language: Callable[[Any], float],
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus | None = None,
    observer: Observer = ignore,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Any, Any]:
    """Convert `teacher` by a recipe into the folder `out` and return (hybrid, report).

    `out`, the Hugging Face folder with tokenizer, `recipe.yaml`, `report.json` and `metrics.jsonl`, appears when
    everything is done; None writes nothing.

    Args:
        halo: `sala.convert.halo`, which this unit may not import.
        score_recall, score_language: model -> score of a candidate for layer selection, higher is better.

    Raises:
        InputError: `out` exists already.
        RecipeError: the recipe does not fit the teacher or the tokenizer.
    """
    if out is not None:
        _require_absent(out)
    corpus = read_corpus(tokenizer) if corpus is None else corpus
    StageRunner(recipe, corpus, observer).check()
    sample = corpus.batches(recipe.stages[0], recipe.seed * SEEDS_PER_RUN + SEEDS_PER_RUN - 1)(0).input_ids

    def convert(record: TextIO | None) -> tuple[Any, Any]:
        return halo(
            teacher,
            recipe.conversion,
            recipe.stages,
            run_stage=StageRunner(recipe, corpus, observer, record),
            score_recall=score_recall,
            score_language=score_language,
            sample=sample[:8],
            seed=recipe.seed,
            say=say,
        )

    if out is None:
        return convert(None)
    with output_folder(out) as folder:
        with (folder / "metrics.jsonl").open("w", encoding="utf-8") as record:
            hybrid, report = convert(record)
        _write_model(folder, hybrid, tokenizer, recipe)
        text = json.dumps(dataclasses.asdict(report), indent=1)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    return hybrid, report
