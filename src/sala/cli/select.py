"""`sala select`: which layers stay attention, by HALO's score over a table."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def select(
    scores: Annotated[Path, typer.Option(help="A JSON table of layer scores.")],
    model: Annotated[str, typer.Option(help="The model's name in the table.")],
    keep: Annotated[int, typer.Option(min=1, help="How many layers stay attention.")],
    eps: Annotated[
        float, typer.Option(help="Epsilon of the score; not below the noise of the language scores.")
    ] = 1e-3,
    first_last: Annotated[
        bool, typer.Option("--first-last", help="Keep the first and the last layer whatever their score.")
    ] = False,
) -> None:
    """Rank layers by HALO's score; the last line is the kept layers."""
    from sala.convert import importance, read_scores
    from sala.convert import select as select_layers

    table = read_scores(scores, model)
    kept = select_layers(table.num_layers, keep, scores=table, epsilon=eps, first_last=first_last)
    values = importance(table, eps)
    view = Table(title=f"{model}: {keep} of {table.num_layers} layers stay attention", title_justify="left")
    for name in ("layer", "recall", "language", "score", "kept"):
        view.add_column(name, justify="right")
    for layer in range(table.num_layers):
        numbers = (table.recall[layer], table.language[layer], values[layer])
        view.add_row(str(layer), *(f"{number:.4g}" for number in numbers), "yes" if layer in kept else "")
    Console(highlight=False).print(view)
    typer.echo(" ".join(map(str, kept)))
