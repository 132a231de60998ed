"""`sala train`: a recipe from its beginning or from where it was left; or what it would cost."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import Display, error_console

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a field of the recipe. May be repeated.")
]
BUILTIN_TEACHER = "embedded-teacher"
DRY_RUN, KEEPING = "Dry run", "What is kept"


class Resume(StrEnum):
    newest = "newest"
    previous = "previous"


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe of the package by name, or a YAML file.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the run. The same command again goes on where it was left; the model appears in its folder final."
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The checkpoint that a recipe with 'conversion' converts.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The checkpoint that another recipe trains, in place of random weights.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A checkpoint whose tokenizer is used; that of the teacher or the model when left out."),
    ] = None,
    settings: Settings = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=KEEPING)
    ] = None,
    save_minutes: Annotated[
        float, typer.Option(min=0, help="Minutes between checkpoints, without --save-every.", rich_help_panel=KEEPING)
    ] = 15.0,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints that stay.", rich_help_panel=KEEPING)] = 2,
    resume: Annotated[
        Resume, typer.Option(help="The checkpoint to go on from, of those that are there.", rich_help_panel=KEEPING)
    ] = Resume.newest,
    wandb: Annotated[
        str | None, typer.Option(help="A project of Weights & Biases to log to.", rich_help_panel=KEEPING)
    ] = None,
    threads: Threads = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing; print steps, tokens, FLOPs, memory and GPU-hours of each stage, of conversions too.",
            rich_help_panel=DRY_RUN,
        ),
    ] = False,
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
    """Run a recipe: convert a teacher, or train a model; or print what it costs.

    Several processes share the work when torchrun starts them. `sala train plot RUN` draws a run, `sala train export RUN`
    writes its model, one under way too.
    """
    prepare(threads)
    from sala.errors import InputError
    from sala.train import ConversionRecipe, load_recipe

    loaded = load_recipe(recipe, settings or ())
    if dry_run:
        from sala.cli.dry_run import dry_run as plan

        if out is not None:
            raise InputError("--out has no effect with --dry-run, which writes nothing; leave one of them out")
        if tokenizer is not None and (isinstance(loaded, ConversionRecipe) or loaded.model is None):
            raise InputError("--tokenizer has no effect with --dry-run but for a recipe with 'model'; leave it out")
        _refuse(context, KEEPING, "has no effect with --dry-run")
        _check_start(loaded, teacher, model, dry_run=True)
        plan(
            loaded,
            start=teacher or model,
            tokenizer=tokenizer or BUILTIN_TEACHER,
            gpu=gpu,
            gpus=gpus,
            memory=memory,
            mfu=mfu,
            as_json=as_json,
        )
        return
    if save_every is not None and _given(context, "save_minutes"):
        raise InputError("--save-minutes has no effect with --save-every; leave one of them out")
    _refuse(context, DRY_RUN, "is for --dry-run")
    if out is None:
        raise InputError("--out is missing: the folder for the run (or --dry-run, which needs none)")
    from sala.train import RunOptions

    _check_start(loaded, teacher, model, dry_run=False)
    kept = RunOptions(save_every, save_minutes, keep, resume.value, wandb)
    _run(loaded, out, teacher or model, tokenizer, kept)


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse(context: typer.Context, panel: str, reason: str) -> None:
    """Raise InputError when an option of a panel of the help is given."""
    from sala.errors import InputError

    for option in context.command.params:
        if getattr(option, "rich_help_panel", None) == panel and _given(context, str(option.name)):
            raise InputError(f"{option.opts[0]} {reason}; leave it out")


def _check_start(recipe: Any, teacher: str | None, model: str | None, *, dry_run: bool) -> None:
    """Raise RecipeError unless there is what the recipe starts from, and nothing else; a plan may do without a teacher."""
    from sala.errors import RecipeError
    from sala.train import ConversionRecipe

    if isinstance(recipe, ConversionRecipe):
        if (teacher is None and not dry_run) or model is not None:
            raise RecipeError(f"recipe {recipe.name!r} converts a teacher; right would be --teacher CHECKPOINT alone")
    elif teacher is not None:
        raise RecipeError(f"recipe {recipe.name!r} has no teacher; right would be --model CHECKPOINT, or neither")
    elif (model is None) == (recipe.model is None):
        what = "has no 'model' and needs --model CHECKPOINT" if model is None else "describes a new model"
        raise RecipeError(f"recipe {recipe.name!r} {what}; right would be one of the two")


def require_conversion(recipe: Any, teacher: Any) -> None:
    """Raise SalaError when a recipe cannot convert a teacher of this configuration: before anything is written."""
    from sala.convert import planned_configs
    from sala.train.run import require_same_shape, require_trainable

    require_same_shape(recipe, teacher)
    hybrid, _ = planned_configs(teacher, recipe.conversion)
    require_trainable(recipe, hybrid)


def _run(recipe: Any, out: Path, start: str | None, tokenizer: str | None, options: Any) -> None:
    from sala.convert import halo
    from sala.data import load_tokenizer
    from sala.eval import layer_scorers
    from sala.model.checkpoint import find_checkpoint
    from sala.model.families import load_model
    from sala.train import ConversionRecipe, Origin, Scorers, start_world, train

    converts = isinstance(recipe, ConversionRecipe)
    words = load_tokenizer(find_checkpoint(tokenizer or start or BUILTIN_TEACHER))
    network: Any = None if start is None else load_model(find_checkpoint(start), dtype="stored")
    if converts:
        require_conversion(recipe, network.config)
    with start_world(recipe.precision) as world, Display(error_console(), quiet=not world.main) as display:
        scorers = layer_scorers(words) if converts else None
        train(
            recipe,
            out,
            tokenizer=words,
            model=network,
            scorers=None if scorers is None else Scorers(halo, scorers.recall, scorers.language),
            observer=display.observe,
            say=display.say,
            world=world,
            options=options,
            origin=None if start is None else Origin.of(start),
        )
    # once the rows of the display stand still
    if world.main:
        typer.echo(out / "final")
