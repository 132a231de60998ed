"""`sala bench`: what the operators and whole models cost on this machine."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sala.cli.options import Threads, prepare
from sala.cli.progress import error_console

bench = typer.Typer(
    name="bench", help="Measure operators and whole models against torch, and plot it.", no_args_is_help=True
)

DEFAULT_LENGTHS = ("4K", "16K")
# of a training step
DEFAULT_WINDOWS = ("4K", "32K", "128K")
# of a table in a file or a pipe, which has no width of its own
PIPE_WIDTH = 160

Lengths = Annotated[
    list[str] | None, typer.Option("--length", metavar="N", help="Tokens, such as 512, 16K or 1M; may be repeated.")
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, ..., or auto for a GPU where there is one.", rich_help_panel="Machine")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Also write everything measured.")]


@bench.command()
def ops(
    shape: Annotated[str, typer.Option(help="A named shape.")] = "minicpm-sala-9b",
    op: Annotated[list[str] | None, typer.Option(help="Only this operator; may be repeated.")] = None,
    phase: Annotated[
        list[str] | None, typer.Option(help="Only prefill, training, selection or step; may be repeated.")
    ] = None,
    length: Lengths = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only this backend; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each competitor, taken in turns.")] = 5,
    independent: Annotated[
        bool, typer.Option("--independent", help="Tokens that have nothing in common; else neighbours select alike.")
    ] = False,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: the process's own time, for a machine that others use.")
    ] = "wall",
    limit: Annotated[float, typer.Option(min=0, help="Seconds that one sample may take.")] = 300.0,
    device: Device = "auto",
    threads: Threads = None,
    out: Out = None,
) -> None:
    """Time every operator and backend beside torch's SDPA and the machine's ceilings, where it computes the right thing."""
    prepare(threads)
    from sala.bench import OpsPlan, parse_length, run_ops
    from sala.bench.ops import choice
    from sala.engine.load import DTYPES

    plan = OpsPlan(
        shape=shape,
        lengths=tuple(parse_length(text) for text in length or DEFAULT_LENGTHS),
        ops=tuple(op or ()),
        phases=tuple(phase or ()),
        only=tuple(backend or ()),
        dtype=choice("dtype", dtype, DTYPES),
        device=device,
        repeats=repeats,
        independent=independent,
        clock=clock,
        limit_s=limit,
    )
    measure(run_ops, plan, show_ops, out)


@bench.command()
def weights(
    shape: Annotated[str, typer.Option(help="A named hybrid: sala-1b, sala-100m, sala-10m.")] = "sala-100m",
    precision: Annotated[list[str] | None, typer.Option(help="Only bfloat16, int8 or int4; may be repeated.")] = None,
    length: Lengths = None,
    new_tokens: Annotated[int, typer.Option(min=4, max=2**20, help="Tokens decoded after the prompt.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts of each precision and length.")] = 3,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: the process's own time, for a machine that others use.")
    ] = "cpu",
    threads: Threads = None,
    out: Out = None,
) -> None:
    """Prefill and decoding with weights of 4 and 8 bits beside bfloat16, random weights, on the CPU."""
    prepare(threads)
    from sala.bench import WeightsPlan, parse_length, run_weights
    from sala.bench.weights import PRECISIONS

    plan = WeightsPlan(
        shape=shape,
        precisions=tuple(precision or PRECISIONS),
        lengths=tuple(parse_length(text) for text in length or ("512", "4K")),
        new_tokens=new_tokens,
        repeats=repeats,
        clock=clock,
    )
    measure(run_weights, plan, show_weights, out)


def show_weights(results: Mapping[str, Any], console: Console) -> None:
    """Print one row a precision and length."""
    table = Table(box=SIMPLE_HEAD)
    for name in ("precision", "length", "prefill tokens/s", "decode tokens/s", "unrecorded", "of read bandwidth"):
        table.add_column(
            name, justify="right" if "/" in name or name in ("unrecorded", "of read bandwidth") else "left"
        )
    for row in results["rows"]:
        table.add_row(
            row["precision"], f"{row['length']:,}", f"{row['prefill_tokens_per_s']:,.0f}",
            f"{row['decode_tokens_per_s']:,.1f}", f"{row['decode_unrecorded_tokens_per_s']:,.1f}",
            f"{row['share_of_read_bandwidth']:.0%}",
        )  # fmt: skip
    console.print(table)


@bench.command()
def latency(
    shape: Annotated[
        str, typer.Option(help="A named pair: minicpm-sala-9b, sala-1b, sala-100m, sala-10m.")
    ] = "sala-100m",
    only: Annotated[str | None, typer.Option(help="Only the hybrid or only its baseline.")] = None,
    length: Lengths = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens of one forward pass.")] = 2048,
    new_tokens: Annotated[int, typer.Option(min=1, max=2**20, help="Tokens decoded after the prompt.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each model at each length, in turns.")] = 3,
    once: Annotated[float, typer.Option(min=0, help="Seconds from which on a run is made once.")] = math.inf,
    limit: Annotated[float, typer.Option(min=0, help="Seconds for one model at one length.")] = 600.0,
    device: Device = "auto",
    threads: Threads = None,
    out: Out = None,
) -> None:
    """Time to first token, decoding and memory of a hybrid and of a full-attention model of its size, random weights."""
    prepare(threads)
    from sala.bench import LatencyPlan, parse_length, run_latency
    from sala.bench.ops import choice
    from sala.engine.load import DTYPES

    plan = LatencyPlan(
        shape=shape,
        lengths=tuple(parse_length(text) for text in length or DEFAULT_LENGTHS),
        only=() if only is None else (only,),
        dtype=choice("dtype", dtype, DTYPES),
        chunk=chunk,
        new_tokens=new_tokens,
        device=device,
        repeats=repeats,
        once_s=once,
        limit_s=limit,
    )
    measure(run_latency, plan, show_latency, out)


@bench.command()
def train(
    shape: Annotated[str, typer.Option(help="A named hybrid: sala-1b, sala-100m, sala-10m.")] = "sala-1b",
    length: Lengths = None,
    loss: Annotated[list[str] | None, typer.Option(help="Only next_token or distill; may be repeated.")] = None,
    precision: Annotated[str, typer.Option(help="bfloat16 or float32, as in a recipe.")] = "bfloat16",
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens of a step; at least one window.")] = "32K",
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 5,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 2,
    compile: Annotated[str, typer.Option(help="auto, on or off, as in a recipe.")] = "auto",
    topk: Annotated[
        list[int] | None,
        typer.Option(min=0, max=2**20, help="Chosen blocks, for memory by their number; may be repeated, 0: none."),
    ] = None,
    blocks_length: Annotated[str, typer.Option(metavar="N", help="Tokens of those passes.")] = "32K",
    threads: Threads = None,
    out: Out = None,
) -> None:
    """Training steps of a hybrid: tokens a second, utilisation, memory, what distillation costs, and memory by blocks chosen."""
    prepare(threads)
    from sala.bench import TrainPlan, parse_length, run_train
    from sala.bench.train import LOSSES

    plan = TrainPlan(
        shape=shape,
        lengths=tuple(parse_length(text) for text in length or DEFAULT_WINDOWS),
        losses=tuple(loss or LOSSES),
        precision=precision,
        tokens=parse_length(tokens),
        steps=steps,
        warm_up=warm_up,
        compile=compile,
        topk=TrainPlan().topk if topk is None else tuple(n for n in topk if n),
        blocks_length=parse_length(blocks_length),
    )
    measure(run_train, plan, show_train, out)


@bench.command()
def batch(
    shape: Annotated[str, typer.Option(help="A named hybrid: sala-1b, sala-100m, sala-10m.")] = "sala-1b",
    length: Lengths = None,
    continuations: Annotated[int, typer.Option(min=1, help="Rows that go on from one prefix.")] = 16,
    prefix: Annotated[str, typer.Option(metavar="N", help="Tokens of that prefix.")] = "64K",
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 9,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: the process's own time, for a machine that others use.")
    ] = "wall",
    threads: Threads = None,
    out: Out = None,
) -> None:
    """One decoding step of rows of many lengths, against its matrix products and each row's attention; and shared prefixes."""
    prepare(threads)
    from sala.bench import BatchPlan, parse_length, run_batch

    lengths = tuple(parse_length(text) for text in length) if length else BatchPlan().lengths
    plan = BatchPlan(shape, lengths, continuations, parse_length(prefix), repeats, clock)
    measure(run_batch, plan, show_batch, out)


@bench.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where the files are that ops and latency wrote.")
    ] = Path("benchmarks/results"),
    out: Annotated[Path | None, typer.Option(help="Folder of the plots; that of the files when left out.")] = None,
) -> None:
    """Draw what was measured, and print it as a Markdown table."""
    prepare(threads=None)
    from sala.bench import write_report

    table, files = write_report(folder, out or folder)
    typer.echo(table)
    for file in files:
        typer.echo(file, err=True)


def measure(
    run: Callable[..., dict[str, Any]], plan: Any, show: Callable[[dict[str, Any], Console], None], out: Path | None
) -> None:
    """Run a plan and show the results; what is measured in hours is written into `out` as it comes.

    Raises:
        DiskError: `out` cannot be written; nothing has been measured.
        MeasurementError: names what failed, after everything else was measured, shown and written.
    """
    from sala.bench import MeasurementError, write_results
    from sala.errors import require_writable

    if out is not None:
        require_writable(out)
    progress = error_console()
    results = run(
        plan,
        say=lambda line: progress.print(line, soft_wrap=True, markup=False),
        keep=lambda results: None if out is None else write_results(out, results),
    )
    show(results, output_console())
    if failures := results["failures"]:
        first = failures[0]
        raise MeasurementError(
            f"{len(failures)} of the competitors failed, the first one {first['who']} in {first['case']}: "
            f"{first['error']}; the file of --out has the rest"
        )


def show_latency(results: Mapping[str, Any], console: Console) -> None:
    """Print one row a length and model."""
    from sala.bench.length import length_label
    from sala.bench.pair import times_faster
    from sala.engine import human_bytes

    settings = results["settings"]
    console.print(
        f"{settings['dtype']}, {_machine(results)}, chunks of {settings['chunk']:,}; "
        + ", ".join(f"{model['name']} {model['parameters']:,} parameters" for model in results["models"].values()),
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD)
    for name in ("length", "model"):
        table.add_column(name, no_wrap=True)
    for name in (
        *("first token", "x floor", "decoding", "of bandwidth"),
        *("memory", "of it cache", "first token x", "decoding x"),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    faster = {(length, figure): times for length, figure, times in times_faster(results["points"])}
    for point in results["points"]:
        cells = [length_label(point["length"]), point["model"]]
        if point["status"] != "measured":
            expected = f" (about {point['expected_s']:,.0f} s)" if "expected_s" in point else ""
            table.add_row(*cells, point["status"] + expected)
            continue
        added = point["added_bytes"]
        cells += [f"{point['first_token_s']:,.2f} s", f"{point['first_token_times_floor']:.2f}"]
        cells += [f"{point['decode_tokens_s']:,.1f} tokens/s", f"{point['decode_share_of_bandwidth']:.0%}"]
        cells.append("" if added is None else human_bytes(point["weights_bytes"] + added))
        cells.append(human_bytes(point["cache_bytes"]))
        if point["who"] == "hybrid":
            ratios = (faster.get((point["length"], figure)) for figure in ("first_token_s", "decode_s"))
            cells += ["" if times is None else f"{times:.2f}" for times in ratios]
        table.add_row(*cells)
    console.print(table)


def show_batch(results: Mapping[str, Any], console: Console) -> None:
    """Print a row for each context, the whole step, and what continuations hold."""
    from sala.bench.length import length_label
    from sala.engine import human_bytes

    console.print(f"{results['shape']}, {results['settings']['dtype']}, {_machine(results)}", soft_wrap=True)
    if "ragged" in results:
        ragged = results["ragged"]
        table = Table(box=SIMPLE_HEAD)
        for name in ("row of", "its attention", "its step alone"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in ragged["rows"]:
            table.add_row(length_label(row["length"]), _time(row["attention_s"]), _time(row["alone_s"]))
        console.print(table)
        console.print(
            f"all together {_time(ragged['step_s'])}: {ragged['times_its_parts']:.2f} times its matrix products "
            f"({_time(ragged['products_s'])}) and the rows' attention, "
            f"{ragged['times_faster_than_one_by_one']:.2f} times faster than one by one",
            soft_wrap=True,
        )
    if "shared" in results:
        shared = results["shared"]
        console.print(
            f"{shared['continuations']} continuations of {length_label(shared['prefix'])}: pages of "
            f"{human_bytes(shared['pages_bytes'])}, {human_bytes(shared['pages_bytes_unshared'])} were they not shared; "
            f"a step of all {_time(shared['step_s'])}",
            soft_wrap=True,
        )


def show_train(results: Mapping[str, Any], console: Console) -> None:
    """Print one row a stage, and one a number of chosen blocks."""
    from sala.bench.length import length_label
    from sala.bench.train import overheads
    from sala.engine import human_bytes

    console.print(
        f"{results['shape']}, {results['parameters']['student']:,} parameters, {results['settings']['precision']}, "
        f"{_machine(results)}",
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD)
    for name in ("window", "loss"):
        table.add_column(name, no_wrap=True)
    for name in ("windows", "step", "tokens/s", "utilisation", "x floor", "peak", "x next token"):
        table.add_column(name, justify="right", no_wrap=True)
    more = overheads(results["points"])
    for point in results["points"]:
        cells = [length_label(point["length"]), point["loss"], str(point["windows"])]
        if point["status"] != "measured":
            table.add_row(*cells, point["status"])
            continue
        cells += [_time(point["step_s"]), f"{point['tokens_s']:,.0f}"]
        cells.append("" if point["mfu"] is None else f"{point['mfu']:.1%}")
        cells.append(f"{point['times_floor']:.2f}")
        cells.append("" if point["peak_bytes"] is None else human_bytes(point["peak_bytes"]))
        if point["loss"] == "distill" and point["length"] in more:
            cells.append(f"{more[point['length']]:.2f}")
        table.add_row(*cells)
    console.print(table)
    if not results["blocks"]:
        return
    table = Table(box=SIMPLE_HEAD)
    for name in ("block-sparse attention, forward and backward", "blocks read", "median", "added"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results["blocks"]:
        added = "" if row["added_bytes"] is None else human_bytes(row["added_bytes"])
        label = f"{length_label(row['length'])}, topk {row['topk']}"
        table.add_row(label, str(row["blocks_read"]), _time(row["median_s"]), added)
    console.print(table)


def output_console() -> Console:
    """Return the console of results: as wide as the terminal, or as a table needs."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def show_ops(results: Mapping[str, Any], console: Console) -> None:
    """Print one row a case and competitor."""
    from sala.bench.length import length_label

    settings, ceilings = results["settings"], results["ceilings"]
    matmul = ", ".join(f"{dtype} {speed / 1e9:,.0f}" for dtype, speed in ceilings["matmul_flops_s"].items())
    console.print(
        f"{results['shape']['name']}, {settings['dtype']}, {_machine(results)}; "
        f"ceilings: matmul {matmul} GFLOP/s, memory {max(ceilings['read_bytes_s'], ceilings['copy_bytes_s']) / 1e9:.1f} GB/s",
        soft_wrap=True,
    )
    for case, reasons in results["unavailable"].items():
        for name, reason in reasons.items():
            console.print(f"{case}: {name} cannot run here: {reason}", soft_wrap=True, markup=False)
    table = Table(box=SIMPLE_HEAD)
    for name in ("case", "length", "who"):
        table.add_column(name, no_wrap=True)
    for name in ("median", "min", "GFLOP/s", "GB/s", "x floor", "added", "x SDPA", "x eager", "x fla"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in results["cases"]:
        case, length = f"{row['op']} {row['phase']}", length_label(row["length"])
        if "skipped" in row:
            console.print(row["skipped"], soft_wrap=True)
            continue
        for name, facts in row["competitors"].items():
            table.add_row(case, length, *_ops_cells(name, facts, row))
            case = length = ""
        table.add_section()
    console.print(table)


def _machine(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    if settings["device"] == "cuda":
        return str(results["environment"]["hardware"]["gpu"]["name"])
    clock = f", {settings['clock']} clock" if "clock" in settings else ""
    return f"{settings['threads']} threads{clock}"


def _ops_cells(name: str, facts: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    from sala.engine import human_bytes

    if "skipped" in facts:
        return [name, f"skipped ({facts['expected_s']:,.0f} s)" if "expected_s" in facts else facts["skipped"]]
    if facts.get("heads_measured", 0) != facts.get("heads", 0):
        name += f", {facts['heads_measured']}/{facts['heads']} heads"
    if "kernel" in facts:
        name += f", {facts['kernel']}"
    cells = [name, _time(facts["median_s"]), _time(facts["min_s"])]
    if "times_floor" in facts:
        cells += [f"{facts['flops_s'] / 1e9:,.1f}", f"{facts['bytes_s'] / 1e9:,.2f}", f"{facts['times_floor']:.2f}"]
    else:
        cells += [""] * 3
    added = facts.get("added_bytes")
    cells.append("" if added is None else human_bytes(added))
    for other in ("sdpa", "eager", "fla"):
        ratios = row.get(f"times_faster_than_{other}", {})
        cells.append(f"{ratios[name]:.2f}" if name in ratios else "")
    return cells


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:,.0f} us"
    return f"{seconds * 1e3:,.2f} ms" if seconds < 1 else f"{seconds:,.2f} s"
