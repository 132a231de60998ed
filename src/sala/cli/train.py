"""`sala train`: a model from random weights, by a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import Display, error_console

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a field of the recipe. May be repeated.")
]


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe of the package by name, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="A new folder for the run; the model appears in its folder final.")],
    tokenizer: Annotated[str, typer.Option(help="A checkpoint whose tokenizer is used.")] = "embedded-teacher",
    settings: Settings = None,
    threads: Threads = None,
) -> None:
    """Train a model from random weights."""
    prepare(threads)
    from sala.data import load_tokenizer
    from sala.errors import RecipeError
    from sala.model.checkpoint import find_checkpoint
    from sala.train import TrainingRecipe, load_recipe
    from sala.train import train as run

    loaded = load_recipe(recipe, settings or ())
    if not isinstance(loaded, TrainingRecipe):
        raise RecipeError(
            f"recipe {recipe!r} converts a teacher; right would be a recipe with 'model', or `sala convert`"
        )
    with Display(error_console()) as display:
        run(loaded, out, tokenizer=load_tokenizer(find_checkpoint(tokenizer)), observer=display.observe)
    typer.echo(out / "final")
