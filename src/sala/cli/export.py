"""`sala export`: a checkpoint for another engine."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import prepare


class Target(StrEnum):
    sglang = "sglang"


def export(
    model: Annotated[str, typer.Argument(help="A checkpoint folder or a hub name.")],
    target: Annotated[Target, typer.Option("--for", help="The engine that is to serve it.")],
    out: Annotated[Path, typer.Option(help="A new folder; it appears once it is complete.")],
) -> None:
    """Check that another engine can serve a checkpoint, write the folder, and print the command."""
    prepare(None)
    from sala.model.export import export_for_sglang

    assert target is Target.sglang
    typer.echo(export_for_sglang(model, out))
