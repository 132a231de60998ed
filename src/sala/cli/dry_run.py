"""`sala train --dry-run`: what the stages of a recipe are and cost, as a table or as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from sala.cli.start import BUILTIN_TEACHER, load_words, naming_tokenizer, plan_data

if TYPE_CHECKING:
    from sala.model import MiniCPMSALAConfig
    from sala.recipe import ConversionRecipe, LearningRate, Mesh, TrainingRecipe
    from sala.train.budget import StageBudget
    from sala.train.cards import Cluster
    from sala.train.flops import Networks

GIB = 2**30


def dry_run(
    recipe: "TrainingRecipe | ConversionRecipe",
    *,
    start: str | None,
    tokenizer: str | None,
    gpu: str,
    gpus: int | None,
    memory: float | None,
    mfu: float,
    as_json: bool,
) -> None:
    """Print what a recipe costs, unless it could not run; nothing is trained.

    start: the checkpoint to convert or to train, whose configuration is taken; None means the recipe's own, and of a
        conversion without one the embedded teacher.
    tokenizer: as for the run. Of a recipe's own teacher none is known: then its data is not asked what it holds.
    """
    from sala.runs.checks import networks_of, require_feeds
    from sala.train.budget import stage_budgets
    from sala.train.cards import cluster

    recipe = recipe.on_ranks(gpus or 1)
    machine = cluster(gpu, precision=recipe.precision, gpus=gpus, memory_gib=memory, mfu=mfu)
    config, source, origin = _shape(recipe, start, tokenizer)
    words = None if source is None else load_words(source)
    with naming_tokenizer(named=bool(tokenizer or start)):
        networks = networks_of(recipe, config, words)
        data = plan_data(recipe, words)
    rows = stage_budgets(recipe, networks, machine)
    if data is not None:
        require_feeds(recipe, data, [row.mesh.data_parallel for row in rows])
    if as_json:
        typer.echo(json.dumps(_plain(recipe.name, origin, machine, networks, rows), indent=1))
    else:
        _print(recipe.name, origin, machine, networks, rows, recipe.precision)


def _shape(
    recipe: "TrainingRecipe | ConversionRecipe", start: str | None, tokenizer: str | None
) -> tuple["MiniCPMSALAConfig | None", str | None, str]:
    """Return the configuration of what is converted or trained (None: the recipe's new model), where the tokenizer is
    from (None: not known), and in words whose shape it is.
    """
    from sala.model.checkpoint import find_checkpoint
    from sala.model.families import config_from, load_config
    from sala.model.report import check_tensors
    from sala.recipe import ConversionRecipe, TrainingRecipe
    from sala.runs import Origin

    if start is None and isinstance(recipe, TrainingRecipe):
        source = tokenizer or BUILTIN_TEACHER
        return None, source, f"the recipe's model with the vocabulary of {source}"
    if start is None and isinstance(recipe, ConversionRecipe) and recipe.teacher is not None:
        return config_from(recipe.teacher), tokenizer, "the recipe's teacher"
    name = start or BUILTIN_TEACHER
    config = load_config(name)
    if not Origin.of(name).on_hub:
        check_tensors(find_checkpoint(name), config)
    return config, tokenizer or name, f"{'teacher' if isinstance(recipe, ConversionRecipe) else 'model'} {name}"


def _plain(
    name: str, origin: str, machine: "Cluster", networks: "Networks", rows: "Sequence[StageBudget]"
) -> dict[str, Any]:
    from sala.model.report import num_parameters

    stages = []
    for row in rows:
        stage = row.stage
        stages.append(
            {
                "name": stage.name,
                "loss": stage.loss,
                "trainable": stage.trainable,
                "sparse": stage.sparse,
                "length": stage.length,
                "batch": stage.batch,
                "batch_tokens": stage.batch * stage.length,
                "steps": stage.steps,
                "tokens": stage.tokens,
                "learning_rate": stage.learning_rate.model_dump(),
                "mesh": row.mesh.model_dump(),
                "gpus": row.mesh.ranks,
                "micro_batch": row.micro_batch,
                "accumulation": row.accumulation,
                "trained_parameters": row.trained_parameters,
                "flops": dataclasses.asdict(row.flops) | {"total": row.flops.total},
                "memory_bytes": dataclasses.asdict(row.memory) | {"total": row.memory.total},
                "fits": row.fits,
                "gpu_hours": row.gpu_hours,
                "hours": row.hours,
            }
        )
    return {
        "recipe": name,
        "shape": origin,
        "parameters": num_parameters(networks.student),
        "cluster": dataclasses.asdict(machine),
        "stages": stages,
        "total": {
            "tokens": sum(row.stage.tokens for row in rows),
            "steps": sum(row.stage.steps for row in rows),
            "flops": sum(row.flops.total for row in rows),
            "gpu_hours": sum(row.gpu_hours for row in rows),
        },
    }


def _short(number: float) -> str:
    """Return 314572800000 as 314.57B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"


def _curve(rate: "LearningRate") -> str:
    warm_up = f", {rate.warmup_steps:,} up" if rate.warmup_steps else ""
    to = "" if rate.curve == "constant" else f" to {rate.final:g}"
    return f"{rate.peak:g}{to} {rate.curve}{warm_up}"


def _mesh(mesh: "Mesh") -> str:
    return f"{mesh.dp_replicate} x {mesh.dp_shard} x {mesh.cp}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:.2f}" if gib >= 0.1 or not gib else f"{gib:.1g}"


def _table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print(
    name: str, origin: str, machine: "Cluster", networks: "Networks", rows: "Sequence[StageBudget]", precision: str
) -> None:
    from sala.model.report import num_parameters

    # wide rows are for a pager or a file, not to be cut
    console = Console(highlight=False, markup=False, width=200)
    gib = machine.memory_bytes / GIB
    console.print(f"{name}: {_short(num_parameters(networks.student))} parameters ({origin}), computed in {precision}")
    console.print(
        f"GPU {machine.gpu}: {machine.peak_flops_s / 1e12:g} TFLOP/s, of which {machine.mfu:.0%} are reached, {gib:g} GiB\n"
    )
    _table(
        console,
        (
            "stage",
            "loss",
            "trains",
            "parameters",
            "sparse",
            "length",
            "windows",
            "batch tokens",
            "steps",
            "tokens",
            "learning rate",
        ),
        [
            (
                row.stage.name,
                row.stage.loss,
                ("twins" if row.stage.loss == "align" else row.stage.trainable)
                + (" but q/k" if row.stage.freeze_qk else ""),
                _short(row.trained_parameters),
                "on" if row.stage.sparse else "off",
                f"{row.stage.length:,}",
                f"{row.stage.batch:,}",
                f"{row.stage.batch * row.stage.length:,}",
                f"{row.stage.steps:,}",
                _short(row.stage.tokens),
                _curve(row.stage.learning_rate),
            )
            for row in rows
        ],
    )
    console.print()
    parts = ("forward", "backward", "recompute", "teacher")
    _table(
        console,
        ("FLOPs", *parts, "total", "GPU-hours", "GPUs", "hours"),
        [
            (
                row.stage.name,
                *(f"{getattr(row.flops, part):.2e}" if getattr(row.flops, part) else "-" for part in parts),
                f"{row.flops.total:.2e}",
                _hours(row.gpu_hours),
                f"{row.mesh.ranks:,}",
                _hours(row.hours),
            )
            for row in rows
        ],
    )
    console.print()
    memory = [field.name for field in dataclasses.fields(rows[0].memory)]
    _table(
        console,
        ("GiB a GPU", "replicate x shard x cp", "windows", *memory, "total", "fits"),
        [
            (
                row.stage.name,
                _mesh(row.mesh),
                f"{row.accumulation:,} x {row.micro_batch:,}",
                *(_gib(getattr(row.memory, part)) for part in memory),
                _gib(row.memory.total),
                "yes" if row.fits else "no",
            )
            for row in rows
        ],
    )
    tokens, flops = sum(row.stage.tokens for row in rows), sum(row.flops.total for row in rows)
    console.print(
        f"\nIn all {_short(tokens)} tokens, {sum(row.stage.steps for row in rows):,} steps, {flops:.2e} FLOPs, "
        f"{_hours(sum(row.gpu_hours for row in rows))} GPU-hours. Not counted: the scoring of layers, evaluation, checkpoints."
    )
