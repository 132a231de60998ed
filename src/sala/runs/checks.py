"""Whether a recipe can run, told before anything is trained or written: by runs and by dry runs."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sala.convert.plan import planned_configs
from sala.errors import RecipeError, TokenizerError, nearest
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.model.families import config_from
from sala.model.mixers import sparse_mixers, with_mixers
from sala.recipe import ConversionRecipe, Recipe, TrainingRecipe
from sala.train.batches import Data
from sala.train.flops import Networks
from sala.train.initial import require_init
from sala.train.trainable import trainable_parameters

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


def model_config(recipe: TrainingRecipe, tokenizer: PreTrainedTokenizerBase) -> MiniCPMSALAConfig:
    """Return the recipe's configuration; `vocab_size` and special tokens are the tokenizer's unless it says so."""
    assert recipe.model is not None
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
    config = MiniCPMSALAConfig(**(defaults | recipe.model))
    require_vocabulary(config, tokenizer)
    return config


def views(recipe: Recipe, model: Any) -> list[Any]:
    """Return the model as each stage has it: block selection on or off."""
    kinds = model.config.mixer_types
    return [with_mixers(model, sparse_mixers(kinds, stage.sparse)) for stage in recipe.stages]


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


def require_vocabulary(config: MiniCPMSALAConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TokenizerError when a model has no embedding for some pieces of the tokenizer."""
    if len(tokenizer) > config.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {len(tokenizer):,} pieces, the model a vocab_size of {config.vocab_size:,}; expected the "
            "model's own tokenizer, or a vocab_size for all of them"
        )


def networks_of(recipe: Recipe, start: MiniCPMSALAConfig | None, tokenizer: PreTrainedTokenizerBase | None) -> Networks:
    """Return the networks that the stages of a recipe run on.

    start: the configuration of the teacher or of the model to train; None for a new model.
    tokenizer: None where a plan does without, and the vocabulary is taken as it is.

    Raises:
        SalaError: the recipe does not fit them.
    """
    if isinstance(recipe, ConversionRecipe):
        assert start is not None
        require_same_shape(recipe, start)
        hybrid, twins = planned_configs(start, recipe.conversion)
        networks = Networks(hybrid, start, twins)
    else:
        assert isinstance(recipe, TrainingRecipe)
        if start is None:
            assert tokenizer is not None
            start = model_config(recipe, tokenizer)
        networks = Networks(start)
    if tokenizer is not None:
        require_vocabulary(networks.student, tokenizer)
    require_trainable(recipe, networks.student)
    return networks


def require_trainable(recipe: Recipe, config: MiniCPMSALAConfig) -> None:
    """Raise SalaError when a recipe cannot train a model of this configuration.

    A stage would train nothing of it, freeze what it does not have apart or select no blocks, or `init` asks for what it has not.
    """
    with torch.device("meta"):
        model = MiniCPMSALAForCausalLM(config)
    if isinstance(recipe, TrainingRecipe):
        require_init(model, recipe.init)
    for view, stage in zip(views(recipe, model), recipe.stages, strict=True):
        if stage.loss != "align":
            trainable_parameters(view, stage.trainable, freeze_qk=stage.freeze_qk)


def require_feeds(recipe: Recipe, data: Data, data_ranks: Sequence[int]) -> None:
    """Raise RecipeError for what a stage cannot draw; data_ranks: over how many ranks each stage's windows are split."""
    for index, (stage, ranks) in enumerate(zip(recipe.stages, data_ranks, strict=True)):
        try:
            data.feed(stage, recipe.seed, ranks=ranks)
        except RecipeError as error:
            raise RecipeError(f"stages.{index} ({stage.name!r}): {error}") from error
