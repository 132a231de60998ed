"""`sala train`: a recipe from its beginning or from where it was left; or what it would cost."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import Display, error_console
from sala.cli.start import BUILTIN_TEACHER, load_words, naming_tokenizer, require_start

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change a field of the recipe. May be repeated.")
]
DRY_RUN, KEEPING = "Dry run", "What is kept"


class Resume(StrEnum):
    newest = "newest"
    previous = "previous"


Out = Annotated[
    Path | None,
    typer.Option(
        help="The folder of the run. The same command again goes on where it was left; the model appears in its folder final."
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="A checkpoint whose tokenizer is used; that of the teacher or the model when left out."),
]
SaveEvery = Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=KEEPING)]
SaveMinutes = Annotated[
    float, typer.Option(min=0, help="Minutes between checkpoints, without --save-every.", rich_help_panel=KEEPING)
]
Keep = Annotated[int, typer.Option(min=1, help="Checkpoints that stay.", rich_help_panel=KEEPING)]
ResumeFrom = Annotated[
    Resume, typer.Option(help="The checkpoint to go on from, of those that are there.", rich_help_panel=KEEPING)
]
Push = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Upload the finished model to this private repository of the Hugging Face hub."),
]
Wandb = Annotated[str | None, typer.Option(help="A project of Weights & Biases to log to.", rich_help_panel=KEEPING)]


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe of the package by name, or a YAML file.")],
    out: Out = None,
    teacher: Annotated[
        str | None, typer.Option(help="The checkpoint that a recipe with 'conversion' converts.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The checkpoint that another recipe trains, in place of random weights.")
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
    from sala.recipe import load_recipe

    loaded = load_recipe(recipe, settings or ())
    if dry_run:
        from sala.cli.dry_run import dry_run as plan

        if out is not None:
            raise InputError("--out has no effect with --dry-run, which writes nothing; leave one of them out")
        _refuse(context, KEEPING, "has no effect with --dry-run")
        if push is not None:
            raise InputError("--push has no effect with --dry-run, which writes nothing; leave one of them out")
        require_start(loaded, teacher, model, dry_run=True)
        plan(
            loaded,
            start=teacher or model,
            tokenizer=tokenizer,
            gpu=gpu,
            gpus=gpus,
            memory=memory,
            mfu=mfu,
            as_json=as_json,
        )
        return
    _refuse(context, DRY_RUN, "is for --dry-run")
    if out is None:
        raise InputError("--out is missing: the folder for the run (or --dry-run, which needs none)")
    require_start(loaded, teacher, model)
    run(loaded, out, teacher or model, tokenizer, run_options(context), push=push)


def run_options(context: typer.Context) -> Any:
    """Return how a run is kept, by the options of the panel `KEEPING`.

    Raises:
        InputError: two of them exclude each other.
    """
    from sala.errors import InputError
    from sala.runs import RunOptions

    given = context.params
    if given["save_every"] is not None and _given(context, "save_minutes"):
        raise InputError("--save-minutes has no effect with --save-every; leave one of them out")
    return RunOptions(given["save_every"], given["save_minutes"], given["keep"], given["resume"].value, given["wandb"])


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse(context: typer.Context, panel: str, reason: str) -> None:
    """Raise InputError when an option of a panel of the help is given."""
    from sala.errors import InputError

    for option in context.command.params:
        if getattr(option, "rich_help_panel", None) == panel and _given(context, str(option.name)):
            raise InputError(f"{option.opts[0]} {reason}; leave it out")


def run(
    recipe: Any,
    out: Path,
    start: str | None,
    tokenizer: str | None,
    options: Any,
    *,
    budget: str | None = None,
    push: str | None = None,
) -> None:
    """Run a recipe in the folder `out`, from its beginning or from where it was left, and print where the model is.

    start: the checkpoint to convert, or to train; None for a new model. budget: see `sala.runs.forecast.parse_budget`.
    push: the repository that the finished model is sent to; refused before the work where the hub would refuse it.
    """
    from sala.eval import layer_scorers
    from sala.model.checkpoint import find_checkpoint
    from sala.model.families import load_model
    from sala.model.hub import push as push_folder
    from sala.model.hub import require_pushable
    from sala.recipe import ConversionRecipe
    from sala.runs import Finished, Origin, run_recipe
    from sala.runs.forecast import parse_budget, within_budget
    from sala.train import read_data, start_world

    allowed = None if budget is None else parse_budget(budget)
    words = load_words(tokenizer or start or BUILTIN_TEACHER)
    scorers = None
    if isinstance(recipe, ConversionRecipe):
        scorers = layer_scorers(words, **recipe.conversion.scoring.model_dump())
    network: Any = None if start is None else load_model(find_checkpoint(start), dtype="stored")
    with (
        naming_tokenizer(named=bool(tokenizer or start)),
        start_world(recipe.precision) as world,
        Display(error_console(), quiet=not world.main) as display,
    ):
        if push is not None:
            world.first(lambda: require_pushable(push))
        if allowed is not None and scorers is not None:
            recipe = within_budget(
                recipe,
                allowed,
                out,
                model=network,
                scorers=scorers,
                data=read_data(recipe, words),
                world=world,
                say=display.say,
            )
        try:
            run_recipe(
                recipe,
                out,
                tokenizer=words,
                model=network,
                scorers=scorers,
                observer=display.observe,
                say=display.say,
                world=world,
                options=options,
                origin=None if start is None else Origin.of(start),
            )
        except Finished as finished:
            display.say(str(finished))
    # once the rows of the display stand still
    if world.main:
        typer.echo(out / "final")
        if push is not None:
            typer.echo(push_folder(out / "final", push))
