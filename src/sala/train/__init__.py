"""Training: recipes as data, and the one loop that runs their stages."""

from sala.train.batches import Corpus, Data, ShardData, read_corpus, read_data
from sala.train.export import export
from sala.train.folder import Finished, Interrupted, RunOptions
from sala.train.loop import NonFiniteError, Observer, Progress, run_stage
from sala.train.parallel import World, start_world
from sala.train.recipe import ConversionRecipe, Recipe, Stage, TrainingRecipe, load_recipe, parse_recipe, recipe_names
from sala.train.run import Scorers, train
from sala.train.start import Origin

__all__ = [
    "ConversionRecipe",
    "Corpus",
    "Data",
    "Finished",
    "Interrupted",
    "NonFiniteError",
    "Observer",
    "Origin",
    "Progress",
    "Recipe",
    "RunOptions",
    "Scorers",
    "ShardData",
    "Stage",
    "TrainingRecipe",
    "World",
    "export",
    "load_recipe",
    "parse_recipe",
    "read_corpus",
    "read_data",
    "recipe_names",
    "run_stage",
    "start_world",
    "train",
]
