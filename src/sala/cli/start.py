"""What a run starts from, opened and checked: by runs and by dry runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sala.recipe import Recipe
    from sala.train import Data

BUILTIN_TEACHER = "embedded-teacher"


def require_start(recipe: "Recipe", teacher: str | None, model: str | None, *, dry_run: bool = False) -> None:
    """Raise RecipeError unless there is what the recipe starts from, and nothing else; a plan may do without a teacher."""
    from sala.errors import RecipeError
    from sala.recipe import ConversionRecipe, TrainingRecipe

    if isinstance(recipe, ConversionRecipe):
        if (teacher is None and not dry_run) or model is not None:
            raise RecipeError(f"recipe {recipe.name!r} converts a teacher; expected --teacher CHECKPOINT alone")
        return
    assert isinstance(recipe, TrainingRecipe)
    if teacher is not None:
        raise RecipeError(f"recipe {recipe.name!r} has no teacher; expected --model CHECKPOINT, or neither")
    if (model is None) == (recipe.model is None):
        what = "has no 'model' and needs --model CHECKPOINT" if model is None else "describes a new model"
        raise RecipeError(f"recipe {recipe.name!r} {what}; expected one of the two")


def load_words(name: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a checkpoint."""
    from sala.data import load_tokenizer
    from sala.model.checkpoint import find_checkpoint

    return load_tokenizer(find_checkpoint(name))


@contextmanager
def naming_tokenizer(named: bool) -> Iterator[None]:
    """Say where the tokenizer comes from when another one is needed; `named`: the user has named it, or its model."""
    from sala.errors import TokenizerError

    try:
        yield
    except TokenizerError as error:
        if named:
            raise
        raise TokenizerError(
            f"{error}. It is the tokenizer of {BUILTIN_TEACHER}, for none was named; expected --tokenizer CHECKPOINT"
        ) from error


def plan_data(recipe: "Recipe", words: "PreTrainedTokenizerBase | None") -> "Data | None":
    """Return what the stages of a recipe draw from, to ask it what they can draw; None where that is not known.

    Raises:
        InputError: as a run would (`read_data`).
    """
    from sala.train import read_data
    from sala.train.batches import blank_corpus

    if recipe.sources:
        return read_data(recipe, words)
    return None if words is None else blank_corpus(words, max(stage.length for stage in recipe.stages))
