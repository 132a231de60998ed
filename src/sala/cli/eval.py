"""`sala eval`: what a model can do at which length, local or behind a URL."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import counting, error_console

if TYPE_CHECKING:
    from sala.eval import Reader

evaluate = typer.Typer(name="eval", help="Measure what a model can do, at any length.", no_args_is_help=True)

MODEL, DATA, ANSWERS, MACHINE = "Who answers", "What is asked", "How answers are drawn", "Machine"


@evaluate.command()
def run(
    out: Annotated[Path, typer.Option(help="The folder of results; a second run into it asks for what is missing.")],
    tasks: Annotated[
        str, typer.Option(help="Names and groups (see `sala eval tasks`).", rich_help_panel=DATA)
    ] = "ruler",
    lengths: Annotated[str, typer.Option(help="Tokens, answers included: 4K,8K,1M.", rich_help_panel=DATA)] = "4K,8K",
    samples: Annotated[int, typer.Option(min=1, help="Of each task and length.", rich_help_panel=DATA)] = 100,
    style: Annotated[
        str, typer.Option(help="RULER as nvidia, lm-eval or opencompass write and score it.", rich_help_panel=DATA)
    ] = "nvidia",
    seed: Annotated[int, typer.Option(help="Of all samples.", rich_help_panel=DATA)] = 42,
    file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="prose (haystacks), squad, hotpotqa, mrcr, nolima: the texts or official data of tasks. May be repeated.",
            rich_help_panel=DATA,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Write prompts in the tokenizer's chat template.", rich_help_panel=DATA)
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="A checkpoint; with --endpoint the model's name there.", rich_help_panel=MODEL
        ),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="An OpenAI-compatible server, up to /v1.", rich_help_panel=MODEL)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The checkpoint whose tokenizer the endpoint uses.", rich_help_panel=MODEL)
    ] = None,
    key_variable: Annotated[
        str, typer.Option(help="The environment variable with the endpoint's key.", rich_help_panel=MODEL)
    ] = "OPENAI_API_KEY",
    interface: Annotated[
        str,
        typer.Option(
            help="completions (exact token ids) or chat (messages, the server's own template).", rich_help_panel=MODEL
        ),
    ] = "completions",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.", rich_help_panel=MODEL)] = 8,
    retries: Annotated[int, typer.Option(min=0, help="Of a request that fails.", rich_help_panel=MODEL)] = 4,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds of one request.", rich_help_panel=MODEL)] = 600.0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", rich_help_panel=ANSWERS)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from this probability.", rich_help_panel=ANSWERS)] = 1.0,
    batch: Annotated[
        int,
        typer.Option(min=1, help="Windows of one length that a local model reads together.", rich_help_panel=MACHINE),
    ] = 1,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens read in one pass.", rich_help_panel=MACHINE)] = 2048,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.", rich_help_panel=MACHINE)] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto.", rich_help_panel=MACHINE)] = "auto",
    threads: Threads = None,
) -> None:
    """Ask a model or a server every task at every length; prints a table, writes samples, summary and plots into --out."""
    prepare(threads)
    from sala.bench import parse_length
    from sala.data import load_tokenizer
    from sala.data.shards import tokenizer_hash
    from sala.errors import InputError
    from sala.eval import STYLES, Plan, Setting, tasks_named
    from sala.eval.run import TABLE
    from sala.eval.run import run as run_tasks
    from sala.model.checkpoint import find_checkpoint

    console = error_console()
    files = _files(file or [])
    chosen, left_out = tasks_named(_list(tasks), files)
    if style not in STYLES:
        raise InputError(f"--style {style!r}; expected one of {', '.join(STYLES)}")
    sizes = tuple(dict.fromkeys(parse_length(length) for length in _list(lengths)))
    if endpoint is None:
        name = "embedded-hybrid" if model is None else model
        source = name
    elif model is None or tokenizer is None:
        raise InputError(
            "--endpoint needs the model's name there and a tokenizer; expected --model NAME --tokenizer FOLDER"
        )
    else:
        name, source = model, tokenizer
    setting = Setting(load_tokenizer(find_checkpoint(source)), chat, seed, style, files)
    about: dict[str, Any] = {
        "model": name,
        "endpoint": endpoint,
        "interface": interface if endpoint else None,
        "tokenizer": tokenizer_hash(setting.tokenizer)[:16],
        "temperature": temperature,
        "top_p": top_p,
    }
    plan = Plan(tuple(chosen), sizes, samples, about)
    reader: Reader
    if endpoint is None:
        reader = _local(name, max(sizes), dtype, device, chunk, batch, _sampling(temperature, top_p))
    else:
        reader = _remote(endpoint, name, key_variable, interface, concurrency, retries, timeout, temperature, top_p)
    for task in left_out:
        console.print(f"left out: {task.name}, which needs --file {task.needs}=PATH")
    with counting(console, "samples", len(chosen) * len(sizes) * samples, "samples") as advance:
        done = run_tasks(plan, reader, setting, out, lambda record: advance(1))
    typer.echo((out / TABLE).read_text("utf-8"), nl=False)
    failed = sum(row.errors for row in done)
    if failed:
        console.print(f"{failed:,} samples have no score; their errors are in {out / 'samples.jsonl'}")


@evaluate.command()
def tasks() -> None:
    """List the tasks, their groups, and what they need."""
    from sala.eval import TASKS

    for task in TASKS.values():
        needs = f", needs --file {task.needs}=PATH" if task.needs else ""
        typer.echo(f"{task.name:16} {task.group:12} {task.measure}{needs}")


@evaluate.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The folder of a run.")],
    b: Annotated[Path, typer.Argument(help="The folder of another run on the same samples.")],
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Also draw both by length.")] = None,
) -> None:
    """Print how B differs from A, task by task, on the samples that both answered."""
    from sala.errors import InputError
    from sala.eval import compare as compare_samples
    from sala.eval import read_samples
    from sala.eval.summary import differences_markdown

    runs = []
    for folder in (a, b):
        samples = read_samples(folder)
        if not samples:
            raise InputError(
                f"{str(folder)!r} has no samples.jsonl with samples; expected the --out of `sala eval run`"
            )
        runs.append(samples)
    typer.echo(differences_markdown(compare_samples(*runs)), nl=False)
    if plot is not None:
        from sala.errors import writing
        from sala.eval.plots import plot_scores
        from sala.eval.run import read_rows

        named = {folder: read_rows(folder) for folder in (a, b)}
        same = named[a][0] == named[b][0]
        with writing(plot):
            plot_scores(plot, {str(folder) if same else name: rows for folder, (name, rows) in named.items()})


@evaluate.command()
def blocks(
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture.")],
    task: Annotated[str, typer.Option(help="A task whose samples know where their answer lies.")] = "niah_single_2",
    length: Annotated[str, typer.Option(help="Tokens, such as 16K.")] = "16K",
    index: Annotated[int, typer.Option(min=0, help="Which sample.")] = 0,
    model: Annotated[str, typer.Option("--model", "-m", help="A checkpoint.")] = "embedded-hybrid",
    chat: Annotated[bool, typer.Option("--chat", help="Write the prompt in the chat template.")] = False,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens read in one pass.", rich_help_panel=MACHINE)] = 2048,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.", rich_help_panel=MACHINE)] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto.", rich_help_panel=MACHINE)] = "auto",
    threads: Threads = None,
) -> None:
    """Draw which blocks the sparse layers chose at the end of one sample, and whether the answer's was among them."""
    prepare(threads)
    import torch

    from sala import engine
    from sala.bench import parse_length
    from sala.errors import InputError, require_writable
    from sala.eval import Prompt, Setting, count_blocks, tasks_named
    from sala.eval.plots import plot_blocks

    [chosen], _ = tasks_named([task], {})
    checkpoint = engine.open_checkpoint(model, dtype, device)
    setting = Setting(checkpoint.tokenizer, chat)
    sample = chosen.make(setting, parse_length(length), index)
    tokens, places = setting.written(sample) if isinstance(sample, Prompt) else (sample.tokens.tolist(), sample.places)
    if not places:
        raise InputError(f"task {task!r} has no one place of its answer; expected a needle's, such as niah_single_2")
    require_writable(out)
    network = engine.load(checkpoint, len(tokens), chunk)
    ids_T, end = torch.tensor(tokens, device=network.device), torch.tensor([len(tokens) - 1])
    with count_blocks(network, since=len(tokens) - 1) as count:
        engine.logits_at(network, ids_T, end, chunk=chunk)
    if not count.chosen:
        raise InputError(
            f"no layer of {model!r} chooses blocks among {len(tokens):,} tokens; expected block-sparse layers and a "
            "greater --length"
        )
    found = plot_blocks(out, count, places)
    groups = sum(len(rows) for rows in count.chosen.values())
    typer.echo(f"{found} of {groups} groups of heads chose the answer's blocks; drawn into {out}")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _files(given: list[str]) -> dict[str, Path]:
    from sala.errors import InputError, nearest

    known = ("prose", "squad", "hotpotqa", "mrcr", "nolima")
    files = {}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not equals or name not in known:
            raise InputError(
                f"--file {pair!r}; expected NAME=PATH, NAME one of {', '.join(known)}{nearest(name, known)}"
            )
        if not Path(path).is_file():
            raise InputError(f"--file {pair!r}: no file {path!r}; expected one that exists")
        files[name] = Path(path)
    return files


def _sampling(temperature: float, top_p: float) -> Any:
    from sala.engine import Sampling

    return Sampling(temperature=temperature, top_p=top_p, seed=0)


def _local(name: str, length: int, dtype: str, device: str, chunk: int, batch: int, sampling: Any) -> "Reader":
    from sala import engine
    from sala.eval import LocalReader

    checkpoint = engine.open_checkpoint(name, dtype, device)
    network = engine.load(checkpoint, length, chunk)
    return LocalReader(network, checkpoint.tokenizer, name=name, chunk=chunk, batch=batch, sampling=sampling)


def _remote(
    url: str,
    name: str,
    key_variable: str,
    interface: str,
    concurrency: int,
    retries: int,
    timeout: float,
    temperature: float,
    top_p: float,
) -> "Reader":
    from sala.errors import InputError
    from sala.eval.endpoint import EndpointReader

    if interface not in ("completions", "chat"):
        raise InputError(f"--interface {interface!r}; expected completions or chat")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return EndpointReader(
        url,
        name,
        key=os.environ.get(key_variable),
        interface=interface,  # type: ignore[arg-type]
        concurrency=concurrency,
        retries=retries,
        timeout_s=timeout,
        sampling={"temperature": temperature, "top_p": top_p},
    )
