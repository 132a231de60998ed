"""`sala select`: which layers stay attention, by HALO's score over a table."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def select(
    scores: Annotated[Path, typer.Option(help="A JSON table of layer scores, or a conversion's selection.json.")],
    keep: Annotated[int, typer.Option(min=1, help="How many layers stay attention.")],
    model: Annotated[str | None, typer.Option(help="The model's name in a table of several.")] = None,
    eps: Annotated[
        float, typer.Option(help="Epsilon of the score; not below the noise of the language scores.")
    ] = 1e-3,
    first_last: Annotated[
        bool, typer.Option("--first-last", help="Keep the first and the last layer whatever their score.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the layers into this PNG file too.")] = None,
) -> None:
    """Rank layers by HALO's score; the last line is the kept layers."""
    from sala.convert import Selection, importance, plot_selection, read_scores
    from sala.convert import select as select_layers
    from sala.errors import InputError

    if plot is not None and plot.suffix != ".png":
        right = str(plot.with_suffix(".png")) if plot.name else "layers.png"
        raise InputError(f"--plot {str(plot)!r}: the picture is a PNG; expected {right!r}")
    table = read_scores(scores, model)
    selection = Selection(
        num_layers=table.num_layers,
        method="halo",
        epsilon=eps,
        first_last=first_last,
        kept=select_layers(table.num_layers, keep, scores=table, epsilon=eps, first_last=first_last),
        scores=table,
        importance=importance(table, eps),
    )
    title = f"{model or scores}: {keep} of {table.num_layers} layers stay attention"
    if plot is not None:
        try:
            plot_selection(plot, selection, title)
        except OSError as error:
            raise InputError(f"cannot write {str(plot)!r}: {error.strerror}") from error
    columns = ("layer", "recall", "language", "importance")
    view = Table(title=title, title_justify="left")
    for name in (*columns, "kept"):
        view.add_column(name, justify="right")
    for row in selection.rows():
        view.add_row(*(f"{row[name]:.4g}" for name in columns), "yes" if row["kept"] else "")
    Console(highlight=False, markup=False).print(view)
    if selection.warning is not None:
        typer.echo(selection.warning, err=True)
    typer.echo(" ".join(map(str, selection.kept)))
