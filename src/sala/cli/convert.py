"""`sala convert`: a pretrained Transformer becomes a hybrid, by a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import Display, error_console
from sala.cli.train import Settings, require_conversion


def convert(
    teacher: Annotated[
        str,
        typer.Option(
            help="A Llama, Mistral, Qwen2, Qwen3 or MiniCPM checkpoint: a folder, a GGUF file, a hub name, or one of the package."
        ),
    ],
    recipe: Annotated[str, typer.Option(help="A recipe of the package by name, or a YAML file.")],
    out: Annotated[Path, typer.Option(help="A new folder for the hybrid; it appears once it is complete.")],
    settings: Settings = None,
    threads: Threads = None,
) -> None:
    """Convert a pretrained Transformer into a sparse-linear hybrid (HALO)."""
    prepare(threads)
    from sala.convert import halo
    from sala.data import load_tokenizer
    from sala.errors import RecipeError
    from sala.eval import layer_scorers
    from sala.model.checkpoint import find_checkpoint
    from sala.model.families import load_model
    from sala.train import ConversionRecipe, Origin, Scorers, load_recipe, run_conversion

    loaded = load_recipe(recipe, settings or ())
    if not isinstance(loaded, ConversionRecipe):
        raise RecipeError(
            f"recipe {recipe!r} trains a model from scratch; right would be a recipe with 'conversion', or `sala train`"
        )
    folder = find_checkpoint(teacher)
    network, tokenizer = load_model(folder, dtype="stored"), load_tokenizer(folder)
    require_conversion(loaded, network.config)
    scorers = layer_scorers(tokenizer)
    with Display(error_console()) as display:
        run_conversion(
            loaded,
            network,
            out,
            scorers=Scorers(halo, scorers.recall, scorers.language),
            tokenizer=tokenizer,
            observer=display.observe,
            say=display.say,
            origin=Origin.of(teacher),
        )
    typer.echo(out)
