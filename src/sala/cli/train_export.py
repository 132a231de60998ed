"""`sala train export`: the model of a run, one under way too."""

from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.train import Push, Resume


def train_export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run: under way, interrupted or finished.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the model; it appears once it is complete.")],
    resume: Annotated[Resume, typer.Option(help="Which of the run's checkpoints.")] = Resume.newest,
    push: Push = None,
    threads: Threads = None,
) -> None:
    """Write the model of a run's newest checkpoint as a Hugging Face folder; the run goes on undisturbed."""
    prepare(threads)
    from sala.model.hub import push as push_folder
    from sala.model.hub import require_pushable
    from sala.runs import export

    if push is not None:
        require_pushable(push)
    export(run, out, resume=resume.value)
    typer.echo(out)
    if push is not None:
        typer.echo(push_folder(out, push))
