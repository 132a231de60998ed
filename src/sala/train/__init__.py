"""Training: recipes as data, and the one loop that runs their stages."""

from sala.train.batches import Corpus, read_corpus
from sala.train.loop import NonFiniteError, Observer, Progress, run_stage
from sala.train.recipe import ConversionRecipe, Recipe, Stage, TrainingRecipe, load_recipe, parse_recipe, recipe_names
from sala.train.run import run_conversion, train

__all__ = [
    "ConversionRecipe",
    "Corpus",
    "NonFiniteError",
    "Observer",
    "Progress",
    "Recipe",
    "Stage",
    "TrainingRecipe",
    "load_recipe",
    "parse_recipe",
    "read_corpus",
    "recipe_names",
    "run_conversion",
    "run_stage",
    "train",
]
