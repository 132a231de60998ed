"""`sala train`: a model from random weights, by a recipe; or what any recipe would cost."""

from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import Display, error_console

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a field of the recipe. May be repeated.")
]
DRY_RUN = "Dry run"


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe of the package by name, or a YAML file.")],
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the run; the model appears in its folder final.")
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="A checkpoint whose tokenizer is used.")] = "embedded-teacher",
    settings: Settings = None,
    threads: Threads = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing; print steps, tokens, FLOPs, memory and GPU-hours of each stage, of conversions too.",
            rich_help_panel=DRY_RUN,
        ),
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(help="The checkpoint to convert, for a recipe without one.", rich_help_panel=DRY_RUN),
    ] = None,
    gpu: Annotated[
        str, typer.Option(help="h100, h200, a100, ..., or a number of TFLOP/s.", rich_help_panel=DRY_RUN)
    ] = "h100",
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="How many; as many as the recipe's mesh when left out.", rich_help_panel=DRY_RUN),
    ] = None,
    memory: Annotated[float | None, typer.Option(help="GiB of a GPU.", rich_help_panel=DRY_RUN)] = None,
    mfu: Annotated[float, typer.Option(help="Part of the peak that is reached.", rich_help_panel=DRY_RUN)] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=DRY_RUN)] = False,
) -> None:
    """Train a model from random weights, or print what a recipe costs.

    `sala train plot RUN` draws a run, one under way too.
    """
    prepare(threads)
    from sala.errors import InputError, RecipeError
    from sala.train import TrainingRecipe, load_recipe

    loaded = load_recipe(recipe, settings or ())
    if dry_run:
        from sala.cli.dry_run import dry_run as plan

        if out is not None:
            raise InputError("--out has no effect with --dry-run, which writes nothing; leave one of them out")
        plan(
            loaded,
            teacher=teacher,
            tokenizer=tokenizer,
            gpu=gpu,
            gpus=gpus,
            memory=memory,
            mfu=mfu,
            as_json=as_json,
        )
        return
    options = {"teacher": "--teacher", "gpu": "--gpu", "gpus": "--gpus", "memory": "--memory", "mfu": "--mfu"}
    for name, option in (options | {"as_json": "--json"}).items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InputError(f"{option} is for --dry-run")
    if out is None:
        raise InputError("--out is missing: the folder for the run (or --dry-run, which needs none)")
    if not isinstance(loaded, TrainingRecipe):
        raise RecipeError(
            f"recipe {recipe!r} converts a teacher; right would be a recipe with 'model', or `sala convert`"
        )
    from sala.data import load_tokenizer
    from sala.model.checkpoint import find_checkpoint
    from sala.train import train as run

    with Display(error_console()) as display:
        run(loaded, out, tokenizer=load_tokenizer(find_checkpoint(tokenizer)), observer=display.observe)
    typer.echo(out / "final")
