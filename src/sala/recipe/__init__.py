"""Recipes: runs as data. The schema is strict, and a resolved recipe has every field."""

from sala.recipe.conversion import Conversion, Keep, Scoring, Sparse
from sala.recipe.load import load_recipe, override, parse_recipe, recipe_names
from sala.recipe.recipe import Card, ConversionRecipe, Init, Recipe, SourceRow, TrainingRecipe, Validation
from sala.recipe.stage import LearningRate, Mesh, Optimizer, Stage, require_mesh_fits

__all__ = [
    "Card",
    "Conversion",
    "ConversionRecipe",
    "Init",
    "Keep",
    "LearningRate",
    "Mesh",
    "Optimizer",
    "Recipe",
    "Scoring",
    "SourceRow",
    "Sparse",
    "Stage",
    "TrainingRecipe",
    "Validation",
    "load_recipe",
    "override",
    "parse_recipe",
    "recipe_names",
    "require_mesh_fits",
]
