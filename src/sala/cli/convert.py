"""`sala convert`: a pretrained Transformer becomes a hybrid, by a recipe; the run is that of `sala train --teacher`."""

from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.train import (
    Keep,
    Push,
    Resume,
    ResumeFrom,
    SaveEvery,
    SaveMinutes,
    Settings,
    Tokenizer,
    Wandb,
    run,
    run_options,
)


def convert(
    context: typer.Context,
    teacher: Annotated[
        str,
        typer.Option(
            help="A Llama, Mistral, Qwen2, Qwen3 or MiniCPM checkpoint: a folder, a GGUF file, a hub name, or one of the package."
        ),
    ],
    recipe: Annotated[str, typer.Option(help="A recipe of the package by name, or a YAML file.")],
    out: Annotated[
        Path,
        typer.Option(
            help="The folder of the run. The same command again goes on where it was left; the hybrid appears in its folder "
            "final."
        ),
    ],
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="2h|5M",
            help="Time, or tokens of training. The recipe's steps are cut or stretched to it, and it says what each stage takes.",
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    settings: Settings = None,
    save_every: SaveEvery = None,
    save_minutes: SaveMinutes = 15.0,
    keep: Keep = 2,
    resume: ResumeFrom = Resume.newest,
    wandb: Wandb = None,
    push: Push = None,
    threads: Threads = None,
) -> None:
    """Convert a pretrained Transformer into a sparse-linear hybrid (HALO).

    The run is that of `sala train RECIPE --teacher CHECKPOINT`: it can be stopped and goes on, and torchrun may start it.
    """
    prepare(threads)
    from sala.errors import RecipeError
    from sala.recipe import ConversionRecipe, load_recipe

    loaded = load_recipe(recipe, settings or ())
    if not isinstance(loaded, ConversionRecipe):
        raise RecipeError(
            f"recipe {recipe!r} trains a model from scratch; expected a recipe with 'conversion', or `sala train`"
        )
    run(loaded, out, teacher, tokenizer, run_options(context), budget=budget, push=push)
