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
from sala.model.families import config_from
from sala.model.mixers import sparse_mixers, with_mixers
from sala.train.batches import Corpus, read_corpus
from sala.train.initial import initialize
from sala.train.loop import Observer, Progress, run_stage
from sala.train.recipe import ConversionRecipe, Recipe, Stage, TrainingRecipe

# stages of one run draw different data: each has a seed of its own
SEEDS_PER_RUN = 1000


# what a teacher's configuration must have in common with the one that a recipe's numbers are for
TEACHER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "mixer_types",
)


def ignore(progress: Progress) -> None:
    """The observer that shows nothing."""


def require_runnable(recipe: Recipe) -> None:
    """Raise RecipeError for what can be planned with `sala train --dry-run` but not run yet."""
    for index, stage in enumerate(recipe.stages):
        mesh = recipe.mesh_of(stage)
        if mesh.ranks > 1:
            raise RecipeError(
                f"stages.{index} ({stage.name!r}): a mesh of {mesh.ranks} ranks (dp_replicate {mesh.dp_replicate}, dp_shard "
                f"{mesh.dp_shard}, cp {mesh.cp}) needs the distributed engine, which this version does not have; right "
                "would be 1, 1, 1, or --dry-run, which plans it"
            )
    if recipe.precision != "float32":
        raise RecipeError(
            f"precision {recipe.precision!r} needs the distributed engine, which this version does not have; right would "
            "be 'float32', or --dry-run, which plans it"
        )


def require_same_shape(recipe: ConversionRecipe, teacher: MiniCPMSALAConfig) -> None:
    """Raise RecipeError when a recipe's numbers are for a teacher of another shape."""
    if recipe.teacher is None:
        return
    planned = config_from(recipe.teacher)
    for name in TEACHER_FIELDS:
        wanted, given = getattr(planned, name), getattr(teacher, name)
        if wanted != given:
            raise RecipeError(
                f"recipe {recipe.name!r} is for a teacher with {name} = {wanted}; this one has {given}. Use a recipe for "
                "it, or --set teacher=null to take the numbers as they are"
            )


@dataclass(frozen=True)
class StageRunner:
    """Runs the stages of one recipe: data, seed, optimizer and record of each."""

    recipe: Recipe
    corpus: Corpus
    observer: Observer
    record: TextIO | None = None

    def check(self) -> None:
        """Raise RecipeError for what a stage cannot have, before anything is trained."""
        require_runnable(self.recipe)
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


def model_config(recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase) -> MiniCPMSALAConfig:
    """Return the recipe's configuration; `vocab_size` and special tokens are the tokenizer's unless it says so."""
    known = set(MiniCPMSALAConfig.__annotations__)
    for name in recipe.model:
        if name not in known:
            raise RecipeError(f"model.{name}: unknown key{nearest(name, known)}")
    defaults = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return MiniCPMSALAConfig(**(defaults | recipe.model))


def new_model(recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase) -> MiniCPMSALAForCausalLM:
    """Return a model of `model_config` with random weights of the recipe's seed."""
    config = model_config(recipe, tokenizer)
    torch.manual_seed(recipe.seed)
    model = MiniCPMSALAForCausalLM(config)
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
    kinds = model.config.mixer_types
    views = [with_mixers(model, sparse_mixers(kinds, stage.sparse)) for stage in recipe.stages]
    out.mkdir(parents=True)
    recipe.save(out / "recipe.yaml")
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as record:
        runner = StageRunner(recipe, corpus, observer, record)
        for view, stage in zip(views, recipe.stages, strict=True):
            runner(view, stage)
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
    require_same_shape(recipe, teacher.config)
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
