"""`sala eval`: what a model can do at which length, local or behind a URL."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import counting, error_console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sala.eval import Reader

evaluate = typer.Typer(name="eval", help="Measure what a model can do, at any length.", no_args_is_help=True)

# what --file gives to tasks
FILES = ("prose", "squad", "hotpotqa", "mrcr", "nolima", "humaneval", "mbpp", "livecodebench")
MODEL, DATA, ANSWERS, MACHINE = "Who answers", "What is asked", "How answers are drawn", "Machine"


Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A checkpoint; with --endpoint the model's name there.", rich_help_panel=MODEL),
]
Endpoint = Annotated[
    str | None, typer.Option(metavar="URL", help="An OpenAI-compatible server, up to /v1.", rich_help_panel=MODEL)
]
TokenizerOf = Annotated[
    str | None, typer.Option(help="The checkpoint whose tokenizer the endpoint uses.", rich_help_panel=MODEL)
]
KeyVariable = Annotated[
    str, typer.Option(help="The environment variable with the endpoint's key.", rich_help_panel=MODEL)
]
Interface = Annotated[
    str,
    typer.Option(
        help="completions (exact token ids) or chat (messages, the server's template).", rich_help_panel=MODEL
    ),
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at a time.", rich_help_panel=MODEL)]
Retries = Annotated[int, typer.Option(min=0, help="Of a request that fails.", rich_help_panel=MODEL)]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds of one request.", rich_help_panel=MODEL)]
Chat = Annotated[
    bool, typer.Option("--chat", help="Write prompts in the tokenizer's chat template.", rich_help_panel=DATA)
]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.", rich_help_panel=ANSWERS)]
TopP = Annotated[float, typer.Option(help="Draw from this probability.", rich_help_panel=ANSWERS)]
Batch = Annotated[
    int, typer.Option(min=1, help="Prompts that a local model works on together.", rich_help_panel=MACHINE)
]
Chunk = Annotated[int, typer.Option(min=1, help="Tokens read in one pass.", rich_help_panel=MACHINE)]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.", rich_help_panel=MACHINE)]
Device = Annotated[str, typer.Option(help="cpu, cuda, ... or auto.", rich_help_panel=MACHINE)]


@dataclass(frozen=True)
class Asked:
    """Who answers and how, as given on the command line."""

    model: str | None
    endpoint: str | None
    tokenizer: str | None
    key_variable: str
    interface: str
    concurrency: int
    retries: int
    timeout: float
    temperature: float
    top_p: float
    batch: int
    chunk: int
    dtype: str
    device: str

    @property
    def name(self) -> str:
        return "embedded-hybrid" if self.model is None else self.model

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        from sala.data import load_tokenizer
        from sala.errors import InputError
        from sala.model.checkpoint import find_checkpoint

        if self.endpoint is None:
            return load_tokenizer(find_checkpoint(self.name))
        if self.model is None or self.tokenizer is None:
            raise InputError(
                "--endpoint needs the model's name there and a tokenizer; expected --model NAME --tokenizer FOLDER"
            )
        return load_tokenizer(find_checkpoint(self.tokenizer))

    def about(self) -> dict[str, Any]:
        """Return what a record of a run says of these."""
        interface = self.interface if self.endpoint else None
        drawn = {"temperature": self.temperature, "top_p": self.top_p}
        return {"model": self.name, "endpoint": self.endpoint, "interface": interface, **drawn}

    def reader(self, length: int) -> "Reader":
        """Return the reader, ready for prompts and answers of `length` tokens."""
        return self._local(length) if self.endpoint is None else self._remote(self.endpoint)

    def _local(self, length: int) -> "Reader":
        from sala import engine
        from sala.eval import LocalReader

        # a line a request is for servers
        logging.getLogger("sala.engine.engine").setLevel(logging.WARNING)
        checkpoint = engine.open_checkpoint(self.name, self.dtype, self.device)
        network = engine.load(checkpoint, length, self.chunk)
        sampling = engine.Sampling(temperature=self.temperature, top_p=self.top_p, seed=0)
        return LocalReader(
            network,
            checkpoint.tokenizer,
            name=self.name,
            length=length,
            chunk=self.chunk,
            batch=self.batch,
            sampling=sampling,
        )

    def _remote(self, url: str) -> "Reader":
        from sala.errors import InputError
        from sala.eval.endpoint import EndpointReader

        if self.interface not in ("completions", "chat"):
            raise InputError(f"--interface {self.interface!r}; expected completions or chat")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        return EndpointReader(
            url,
            self.name,
            key=os.environ.get(self.key_variable),
            interface="chat" if self.interface == "chat" else "completions",
            concurrency=self.concurrency,
            retries=self.retries,
            timeout_s=self.timeout,
            sampling={"temperature": self.temperature, "top_p": self.top_p},
        )


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
            help=f"Texts and official data of tasks: {', '.join(FILES)}. May be repeated.",
            rich_help_panel=DATA,
        ),
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option("--allow-code-execution", help="Run the programs that the model writes.", rich_help_panel=DATA),
    ] = False,
    chat: Chat = False,
    model: Model = None,
    endpoint: Endpoint = None,
    tokenizer: TokenizerOf = None,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    interface: Interface = "completions",
    concurrency: Concurrency = 8,
    retries: Retries = 4,
    timeout: Timeout = 600.0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    batch: Batch = 8,
    chunk: Chunk = 2048,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Ask a model or a server every task at every length; prints a table, writes samples, summary and plots into --out."""
    prepare(threads)
    from sala.bench import parse_length
    from sala.data.shards import tokenizer_hash
    from sala.errors import InputError
    from sala.eval import STYLES, Plan, Setting, tasks_named
    from sala.eval import run as run_tasks
    from sala.eval.run import SAMPLES, TABLE

    console = error_console()
    files = _files(file or [])
    chosen, left_out = tasks_named(_list(tasks), files)
    runs_code = [task.name for task in chosen if task.runs_code]
    if runs_code and not allow_code_execution:
        raise InputError(
            f"task {runs_code[0]!r} runs programs that the model writes; expected --allow-code-execution on a machine where "
            "that may be"
        )
    found = next((known for known in STYLES if known == style), None)
    if found is None:
        raise InputError(f"--style {style!r}; expected one of {', '.join(STYLES)}")
    sizes = tuple(dict.fromkeys(parse_length(length) for length in _list(lengths)))
    asked = Asked(
        *(model, endpoint, tokenizer, key_variable, interface, concurrency, retries, timeout, temperature, top_p),
        *(batch, chunk, dtype, device),
    )
    setting = Setting(asked.load_tokenizer(), chat, seed, found, files)
    about = asked.about() | {"tokenizer": tokenizer_hash(setting.tokenizer)[:16]}
    plan = Plan(tuple(chosen), sizes, samples, about)
    reader = asked.reader(max(sizes))
    for task in left_out:
        console.print(f"left out: {task.name}, which needs --file {task.needs}=PATH")
    with counting(console, "samples", len(chosen) * len(sizes) * samples, "samples") as advance:
        rows = run_tasks(plan, reader, setting, out, lambda record: advance(1))
    typer.echo((out / TABLE).read_text("utf-8"), nl=False)
    failed = sum(row.errors for row in rows if " average of " not in row.task)
    if failed:
        console.print(f"{failed:,} samples have no score; their errors are in {out / SAMPLES}")


@evaluate.command()
def suites(
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="The results.")],
    tasks: Annotated[str, typer.Option(help="Names of lm-evaluation-harness.", rich_help_panel=DATA)],
    include: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Task files, say with local data, before the harness's.", rich_help_panel=DATA
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of each task.", rich_help_panel=DATA)] = None,
    length: Annotated[str, typer.Option(help="Longest prompt and answer.", rich_help_panel=DATA)] = "8K",
    chat: Chat = False,
    model: Model = None,
    endpoint: Endpoint = None,
    tokenizer: TokenizerOf = None,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    interface: Interface = "completions",
    concurrency: Concurrency = 8,
    retries: Retries = 4,
    timeout: Timeout = 600.0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    batch: Batch = 8,
    chunk: Chunk = 2048,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Score a model on general suites (CMMLU, MMLU-Pro, BBH, IFEval, AIME, ...) through lm-evaluation-harness."""
    prepare(threads)
    from sala.bench import parse_length
    from sala.errors import require_writable
    from sala.eval import Setting
    from sala.eval.harness import run_suites

    require_writable(out)
    asked = Asked(
        *(model, endpoint, tokenizer, key_variable, interface, concurrency, retries, timeout, temperature, top_p),
        *(batch, chunk, dtype, device),
    )
    setting = Setting(asked.load_tokenizer(), chat)
    found = run_suites(asked.reader(parse_length(length)), setting, _list(tasks), include=include, limit=limit)
    text = json.dumps({"settings": asked.about() | {"chat": chat, "limit": limit}, **found}, indent=1, default=str)
    out.write_text(text + "\n", encoding="utf-8")
    for name, scores in found["results"].items():
        shown = (f"{key} {value:.4f}" for key, value in scores.items() if isinstance(value, float))
        typer.echo(f"{name}: {', '.join(shown)}")


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

    files = {}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not equals or name not in FILES:
            raise InputError(
                f"--file {pair!r}; expected NAME=PATH, NAME one of {', '.join(FILES)}{nearest(name, FILES)}"
            )
        if not Path(path).is_file():
            raise InputError(f"--file {pair!r}: no file {path!r}; expected one that exists")
        files[name] = Path(path)
    return files
