"""`sala inspect`: what a checkpoint is, without reading its weights."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sala.cli.options import prepare

if TYPE_CHECKING:
    from sala.model.report import Report

# one sign a layer: full attention, block-sparse attention, linear attention
FULL, SPARSE, LINEAR = ("█", "red"), ("▓", "yellow"), ("░", "cyan")
SIGNS = {"dense": FULL, "infllm": SPARSE, "lightning": LINEAR}


def inspect(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A checkpoint folder, a GGUF file, a hub name, or a model of the package."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show layers, parameters, memory of the cache, backends, and whether SGLang can load it."""
    prepare(threads=None)
    from sala.model.report import inspect as inspect_checkpoint

    report = inspect_checkpoint(directory)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
        return
    show(report, Console(highlight=False))


def show(report: "Report", console: Console) -> None:
    """Print a report for a person."""
    from sala.model.kinds import KINDS

    console.print(
        f"[bold]{escape(report.folder)}[/bold]  {report.total_parameters:,} parameters, {report.dtype}", soft_wrap=True
    )
    console.print()
    console.print(layer_strip(report.mixer_types))
    for mixer, kind in KINDS.items():
        sign, style = SIGNS[kind.operator]
        layers = [index for index, name in enumerate(report.mixer_types) if name == mixer]
        if layers:
            console.print(
                f"[{style}]{sign}[/{style}] {mixer}: {len(layers)} of {len(report.mixer_types)} layers ({ranges(layers)})"
            )
    console.print()
    console.print(_parameters(report))
    console.print(_memory(report))
    if report.backends:
        console.print("[bold]Backends that would run here[/bold]")
        for operator, (backend, reason) in report.backends.items():
            console.print(f"  {operator}: {backend}, {reason}", soft_wrap=True, markup=False)
    if report.sglang:
        console.print("[bold]SGLang's MiniCPM-SALA model cannot run it:[/bold]")
        for reason in report.sglang:
            console.print(f"  - {reason}", soft_wrap=True, markup=False)
    else:
        console.print("[bold]SGLang's MiniCPM-SALA model can load it[/bold] (its configuration fits; not run here)")


def layer_strip(mixer_types: tuple[str, ...]) -> Text:
    """Return the layers from first to last, one sign each."""
    from sala.model.kinds import KINDS

    strip = Text("0 ")
    for mixer in mixer_types:
        strip.append(*SIGNS[KINDS[mixer].operator])
    return strip.append(f" {len(mixer_types) - 1}")


def ranges(numbers: list[int]) -> str:
    """Return ascending numbers with runs shortened: 0, 2-5, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _parameters(report: "Report") -> Table:
    table = Table(title="Parameters", title_justify="left")
    table.add_column("kind")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    for kind, count in report.parameters.items():
        table.add_row(kind, f"{count:,}", f"{count / report.total_parameters:.1%}")
    return table


def _memory(report: "Report") -> Table:
    from sala.engine import human_bytes

    table = Table(title=f"Cache of one sequence ({report.dtype})", title_justify="left")
    table.add_column("at")
    table.add_column("bytes", justify="right")
    table.add_row("a token", f"{report.cache_bytes_per_token:,.1f}")
    table.add_row("states, at any length", human_bytes(report.state_bytes))
    for label, size in report.cache_bytes.items():
        table.add_row(f"{label} tokens", human_bytes(size))
    return table
