"""`sala plan`: whether a model fits, and how long a text it could read."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sala.cli.options import prepare

if TYPE_CHECKING:
    from sala.engine.plan import MemoryPlan


def plan(
    model: Annotated[
        str,
        typer.Option(help="A checkpoint folder, a GGUF file, a hub name, a model of the package, or a named shape."),
    ],
    memory: Annotated[
        str | None, typer.Option(help="Such as 32GiB or 24GB; what machine or GPU have left when left out.")
    ] = None,
    length: Annotated[str, typer.Option(help="Tokens, such as 16K or 1M.")] = "1M",
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens of one forward pass.")] = 2048,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="bf16, int4, fp32 or fp16; may be repeated. The checkpoint's own and int4 when left out."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda (counted, not measured), or auto for a GPU where there is one.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict weights, cache and working memory of one sequence, and the longest that fits; nothing is loaded."""
    prepare(threads=None)
    from sala.bench.length import parse_length
    from sala.bench.shapes import HYBRIDS, hybrid_config
    from sala.engine.plan import memory_of, parse_bytes, plan_memory, stored_precision
    from sala.model.families import load_config

    tokens = parse_length(length)
    kind, process, available = memory_of(device, None if memory is None else parse_bytes(memory))
    config = hybrid_config(model) if model in HYBRIDS else load_config(model)
    plans = [
        plan_memory(config, name, tokens, chunk, process=process, available=available, device=kind)
        for name in dict.fromkeys(dtype or (stored_precision(config), "int4"))
    ]
    if as_json:
        rows = [asdict(row) | {"total": row.total, "fits": row.fits} for row in plans]
        typer.echo(json.dumps({"model": model, "plans": rows}, indent=1))
        return
    show(model, plans, Console(highlight=False))


def show(model: str, plans: "list[MemoryPlan]", console: Console) -> None:
    """Print the plans side by side."""
    from sala.engine import human_bytes
    from sala.engine.memory import why_no_kernels
    from sala.engine.plan import PRECISIONS

    first = plans[0]
    console.print(
        f"[bold]{escape(model)}[/bold], {first.length:,} tokens in chunks of {first.chunk:,}, {human_bytes(first.available)} of "
        f"{'GPU memory' if first.device == 'cuda' else 'memory'}",
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for row in plans:
        table.add_column(row.precision, justify="right")
    for name in ("process", "weights", "cache"):
        table.add_row(name, *(human_bytes(getattr(row, name)) for row in plans))
    for part, size in first.cache_parts.items():
        if size:
            table.add_row(f"  {part}", *(human_bytes(row.cache_parts[part]) for row in plans))
    for name in ("working", "total"):
        table.add_row(name, *(human_bytes(getattr(row, name)) for row in plans), end_section=name == "working")
    table.add_row("fits", *("yes" if row.fits else "no" for row in plans))
    table.add_row("longest that fits", *(f"{row.longest:,}" if row.longest else "none" for row in plans))
    console.print(table)
    a_token = first.cache_parts["keys and values"] / first.length
    console.print(f"keys and values take {a_token:,.0f} bytes a token in {first.precision}", soft_wrap=True)
    for row in plans:
        console.print(f"{row.precision}: {PRECISIONS[row.precision].note}", soft_wrap=True)
    if first.device == "cuda":
        why_not = why_no_kernels()
        whose = "the kernels for GPUs ask" if why_not is None else f"plain torch asks, at most ({why_not})"
        console.print(f"work is counted from what {whose} for, and 1 GiB allowed beside; not measured", soft_wrap=True)
    if any(PRECISIONS[row.precision].linear_bytes for row in plans):
        console.print("int4 is what `sala quantize --asym` writes", soft_wrap=True)
