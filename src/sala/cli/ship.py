"""`sala ship`: a hybrid of a fetched teacher as a small folder: what training changed, and the hash of the rest."""

from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare


def ship(
    model: Annotated[Path, typer.Argument(help="The folder of a hybrid that trained its mixers only.")],
    out: Annotated[Path, typer.Option(help="A new folder; other verbs take it as a model.")],
    base: Annotated[str, typer.Option(help="The teacher, a model of `sala fetch`.")] = "smollm2-135m-instruct",
    limit_mb: Annotated[float, typer.Option(min=0.1, help="The most that the mixers may take.")] = 40.0,
    threads: Threads = None,
) -> None:
    """Write what training changed, in 8 bits or fewer a number; everything else comes from the teacher's own file."""
    prepare(threads)
    from sala.model.checkpoint import find_checkpoint, output_folder, read_tensors
    from sala.model.shipment import MIXERS, pack

    source = find_checkpoint(model)
    with output_folder(out) as folder:
        facts = pack(read_tensors(source), source, base, folder, round(limit_mb * 1e6))
    typer.echo(out)
    typer.echo(f"{(out / MIXERS).stat().st_size / 1e6:.1f} MB in {facts['levels']} levels a side", err=True)
