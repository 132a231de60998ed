"""`sala quantize`: a checkpoint's weights in 4 or 8 bits a number."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import error_console

TEXT, HOW = "Text", "How"


def quantize(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a hub name, or a model of the package.")],
    out: Annotated[Path, typer.Option(help="The folder to write; the same command goes on with an unfinished one.")],
    bits: Annotated[int, typer.Option(help="4 or 8.", rich_help_panel=HOW)] = 4,
    group: Annotated[
        int | None,
        typer.Option(help="Columns that share a scale, -1 for a row; 128 at 4 bits, a row at 8.", rich_help_panel=HOW),
    ] = None,
    method: Annotated[str, typer.Option(help="gptq, or rtn: to the nearest.", rich_help_panel=HOW)] = "gptq",
    asym: Annotated[bool, typer.Option("--asym", help="With a zero point a group.", rich_help_panel=HOW)] = False,
    act_order: Annotated[
        bool, typer.Option("--act-order", help="GPTQ: columns with the largest inputs first.", rich_help_panel=HOW)
    ] = False,
    damping: Annotated[
        float, typer.Option(help="GPTQ: share of the mean diagonal added to it.", rich_help_panel=HOW)
    ] = 0.01,
    head: Annotated[
        int | None, typer.Option(help="Bits of the head, 4 or 8; left alone when left out.", rich_help_panel=HOW)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Files and folders of text; the last tenth measures. Python's own library when left out.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows that layers are fitted to.", rich_help_panel=TEXT)] = 64,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a window.", rich_help_panel=TEXT)] = 1024,
    threads: Threads = None,
) -> None:
    """Quantize a checkpoint in GPTQ's format, layer by layer, and print as JSON what that costs on unseen text."""
    from sala.data import load_tokenizer
    from sala.model.checkpoint import find_checkpoint
    from sala.quant import Settings
    from sala.quant import quantize as run
    from sala.quant.text import windows

    prepare(threads)
    settings = Settings(bits, group or (128 if bits == 4 else -1), method, not asym, act_order, damping, head)  # type: ignore[arg-type]
    calibration_BT, unseen_BT = windows(load_tokenizer(find_checkpoint(model)), data, samples, length)
    console = error_console()

    def say(layer: int, layers: int, error: float) -> None:
        console.print(f"layer {layer} of {layers}: outputs change by at most {error**0.5:.1%}")

    result = run(model, out, settings, calibration_BT, unseen_BT, say).to_dict()
    del result["errors"]
    typer.echo(json.dumps(result))
