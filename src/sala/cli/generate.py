"""`sala generate`: read text of any length and answer."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sala.cli.options import Threads, prepare
from sala.cli.progress import counting, error_console
from sala.errors import InputError

if TYPE_CHECKING:
    from sala.engine import Checkpoint, Generation

READING, SAMPLING, MACHINE = "What is read", "How the answer is drawn", "Machine"


def generate(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A checkpoint folder, a GGUF file, a hub name, or a model of the package."),
    ] = "embedded-hybrid",
    file: Annotated[
        list[str] | None,
        typer.Option(
            "--file",
            "-f",
            help="A file, a pipe, a folder, a glob, or - for standard input. May be repeated.",
            rich_help_panel=READING,
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What comes after the files.", rich_help_panel=READING)
    ] = "",
    open_: Annotated[
        Path | None,
        typer.Option("--open", help="A document of `sala read`, in place of files.", rich_help_panel=READING),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the text into the tokenizer's chat template.", rich_help_panel=READING)
    ] = False,
    special_tokens: Annotated[
        bool,
        typer.Option(
            "--special-tokens",
            help="Read special tokens spelled out in the text as special tokens.",
            rich_help_panel=READING,
        ),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 takes the likeliest token. Like all of these, the checkpoint's own when left out.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest tokens that have this probability.", rich_help_panel=SAMPLING),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from this many likeliest tokens; 0 is all.", rich_help_panel=SAMPLING)
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 makes tokens seen before less likely.", rich_help_panel=SAMPLING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a drawn answer repeatable.", rich_help_panel=SAMPLING)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Longest answer.", rich_help_panel=SAMPLING)
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the answer before this string. May be repeated.", rich_help_panel=SAMPLING),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print tokens, speeds and memory at the end.")] = False,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens read in one pass; fewer take less memory.", rich_help_panel=MACHINE)
    ] = 2048,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16, auto for the checkpoint's own, or packed: a GGUF file's matrices as stored.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ..., or auto for a GPU where there is one.", rich_help_panel=MACHINE)
    ] = "auto",
    graph: Annotated[
        bool | None,
        typer.Option(
            "--graph/--no-graph",
            help="Decode by a recorded step; where that is possible when left out.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    threads: Threads = None,
) -> None:
    """Read text of any length and answer; the answer goes to standard output as it comes."""
    prepare(threads)
    from sala import engine
    from sala.data.text import read_as_text

    console = error_console()
    checkpoint = engine.open_checkpoint(model, dtype, device)
    sampling = engine.sampling_for(
        checkpoint.generation,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop) if stop else None,
    )
    if file and open_ is not None:
        raise InputError("--file beside --open; expected one of the two")
    document = "" if open_ is None else engine.saved_text(open_)
    if file:
        documents = engine.read_documents(file, sys.stdin.buffer)
        document = documents.text
        if documents.skipped:
            console.print(f"passed over {documents.skipped:,} binary, empty or hidden files")
        if documents.links:
            console.print(f"passed over {documents.links:,} links that lead out of their folder or to a folder")
    ids = engine.encode_prompt(
        checkpoint.tokenizer,
        engine.join(document, prompt),
        checkpoint.config.vocab_size,
        chat,
        parse_special=special_tokens,
        on_spelled=lambda count: console.print(f"{read_as_text(count)}; --special-tokens makes them special"),
    )
    with counting(console, "weights", checkpoint.num_tensors, "tensors") as one_more:
        network = engine.load(checkpoint, len(ids) + sampling.max_new_tokens, chunk, lambda name: one_more(1))

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    cache = None
    if open_ is not None:
        cache = engine.open_cache(open_, network, checkpoint.tokenizer, ids, len(ids) + sampling.max_new_tokens)
    unread = len(ids) - (0 if cache is None else cache.get_seq_length())
    with counting(console, "reading", unread, "tokens") as read:
        answer = engine.generate(
            network,
            checkpoint.tokenizer,
            ids,
            sampling,
            chunk=chunk,
            graph=graph,
            cache=cache,
            on_prefill=read,
            on_text=write,
        )
    if not answer.text.endswith("\n"):
        write("\n")
    if stats:
        console.print(statistics_table(checkpoint, answer))


def statistics_table(checkpoint: "Checkpoint", answer: "Generation") -> Table:
    from sala.engine import human_bytes

    statistics = answer.statistics
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = {
        "computed in": f"{str(checkpoint.dtype).removeprefix('torch.')} on {checkpoint.device}",
        "tokens read": f"{statistics.prompt_tokens:,}",
        "prefill": f"{statistics.prefill_tokens_per_s:,.0f} tokens/s",
        "time to first token": f"{statistics.first_token_s:.2f} s",
        "tokens written": f"{statistics.new_tokens:,} (ended by {answer.finish})",
        "decoding": f"{statistics.decode_tokens_per_s:,.1f} tokens/s",
        "cache": human_bytes(statistics.cache_bytes),
        "peak memory": human_bytes(statistics.peak_bytes),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
