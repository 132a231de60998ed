"""The command line: `sala` and its verbs, one file each."""

import errno
import os
import signal
import sys
import time
from typing import Annotated, Any, NoReturn

from sala.errors import INTERRUPTED, SalaError, loading, shortened

with loading():
    import typer
    from typer.core import TyperGroup

    from sala.cli.bench import bench
    from sala.cli.chat import chat
    from sala.cli.compare import compare
    from sala.cli.convert import convert
    from sala.cli.convert_report import convert_report
    from sala.cli.data import data
    from sala.cli.demo import demo
    from sala.cli.eval import evaluate
    from sala.cli.export import export
    from sala.cli.fetch import fetch
    from sala.cli.generate import generate
    from sala.cli.inspect import inspect
    from sala.cli.plan import plan
    from sala.cli.quantize import quantize
    from sala.cli.read import read
    from sala.cli.select import select
    from sala.cli.serve import serve
    from sala.cli.ship import ship
    from sala.cli.train import train
    from sala.cli.train_export import train_export
    from sala.cli.train_plot import train_plot

# exit codes of a process that a signal stopped: all processes of a run stop together
SIGNALLED = 128
FIRST_SPEAKS_S = 10.0


class Verbs(TyperGroup):
    """Verbs of one word or two: `train RECIPE` and `train plot RUN`, where `plot` is no recipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        pair = " ".join(args[:2])
        return super().parse_args(ctx, [pair, *args[2:]] if pair in self.commands else args)


app = typer.Typer(
    name="sala",
    cls=Verbs,
    help="Turn a pretrained Transformer into a sparse-linear hybrid that reads a million tokens, and run it.",
    no_args_is_help=True,
    # what a user causes is one line of `main`; anything else is ours and keeps its plain traceback
    pretty_exceptions_enable=False,
    add_completion=False,
)
for verb in (
    generate,
    chat,
    compare,
    read,
    serve,
    inspect,
    plan,
    fetch,
    convert,
    quantize,
    convert_report,
    data,
    train,
    train_plot,
    train_export,
    export,
    select,
    ship,
    demo,
):
    app.command(verb.__name__.replace("_", " "))(verb)
app.add_typer(bench)
app.add_typer(evaluate)


def _show_version(wanted: bool) -> None:
    if wanted:
        from sala import __version__

        typer.echo(f"sala {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Turn a pretrained Transformer into a sparse-linear hybrid that reads a million tokens, and run it."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command line and exit: 0, 2 for what the user can put right, 130 when interrupted.

    arguments: without the program's name; those of the process when None.
    """
    try:
        app(args=arguments, prog_name="sala")
    except SystemExit as leaving:
        # typer's way with Ctrl-C, outside of what saves first
        if leaving.code == SIGNALLED + signal.SIGINT and _first_here():
            print(INTERRUPTED, file=sys.stderr)
        raise
    except OSError as error:
        # only a person gives such a name; any other error of the system keeps its traceback
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"sala: {shortened(str(error.filename))!r}: {error.strerror}; expected a shorter name", file=sys.stderr)
        sys.exit(SalaError.exit_code)
    except SalaError as error:
        _require_turn(error)
        print(f"sala: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


def _first_here() -> bool:
    return (os.environ.get("LOCAL_RANK") or "0") == "0"


def _require_turn(error: SalaError) -> None:
    """Let the first process that torchrun started on a machine speak for the others, which fail in the same way."""
    if _first_here():
        return
    if error.exit_code >= SIGNALLED:
        sys.exit(error.exit_code)
    # torchrun ends all as soon as one has ended; who is still there then failed alone, and says so itself
    time.sleep(FIRST_SPEAKS_S)
