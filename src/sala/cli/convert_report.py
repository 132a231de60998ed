"""`sala convert report`: what a finished conversion did, and what the hybrid can do beside its teacher."""

from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import error_console


def convert_report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished `sala convert`.")],
    out: Annotated[Path | None, typer.Option(help="A folder; RUN/report when left out.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, such as 512,8K,64K.")] = "512,2K",
    tasks: Annotated[str, typer.Option(help="Tasks of `sala eval`.")] = "ppl,niah_single_2",
    samples: Annotated[int, typer.Option(min=2, help="Of each task and length.")] = 8,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What both are asked. May be repeated.")
    ] = None,
    prose: Annotated[
        Path | None, typer.Option(help="A text that neither was trained on; Python's source code when left out.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Measure hybrid and teacher: perplexity and retrieval by length, time, memory, answers. Writes a page and JSON."""
    prepare(threads)
    from sala.bench import parse_length
    from sala.demo.conversion import PROMPTS, ReportPlan, report_conversion
    from sala.demo.folder import PAGE

    target = out or run / "report"
    plan = ReportPlan(
        lengths=tuple(dict.fromkeys(parse_length(length.strip()) for length in lengths.split(","))),
        tasks=tuple(task.strip() for task in tasks.split(",")),
        samples=samples,
        prompts=tuple(prompt or PROMPTS),
        prose=prose,
    )
    report_conversion(run, target, plan, say=error_console().print)
    typer.echo(target / PAGE)
