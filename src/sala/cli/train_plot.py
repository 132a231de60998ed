"""`sala train plot`: what a run did so far, as a picture."""

from pathlib import Path
from typing import Annotated

import typer


def train_plot(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run: finished, interrupted or under way.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Where to draw; RUN/training.png when left out.")
    ] = None,
) -> None:
    """Draw a run: loss of each stage, learning rate, gradient norm and tokens/s against tokens."""
    from sala.runs.plot import plot_run

    target = out or run / "training.png"
    plot_run(run, target)
    typer.echo(target)
