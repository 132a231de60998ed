"""`sala demo`: the whole story on the embedded teacher, with a report."""

from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import Display, error_console


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("report"),
    quick: Annotated[bool, typer.Option("--quick", help="Under two minutes, at lower quality.")] = False,
    threads: Threads = None,
) -> None:
    """Convert the embedded teacher, train the hybrid, and show what that bought."""
    prepare(threads)
    from sala.demo import PHASES, Moment, run_demo

    with Display(error_console()) as display:

        def observe(moment: Moment) -> None:
            # stages of training keep their rows with the last loss; measurements are many and short
            display.observe(moment, None if moment.phase == "convert" else PHASES[moment.phase])

        run_demo(out, quick=quick, observer=observe, say=display.say)
    typer.echo(out / "index.html")
