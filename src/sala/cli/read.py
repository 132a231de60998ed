"""`sala read`: read a text once and keep what the model remembers of it as a file."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import counting, error_console


def read(
    files: Annotated[list[str], typer.Argument(help="Files, folders, globs, or - for standard input.")],
    save: Annotated[Path, typer.Option(help="Where the document is written, such as book.sala.")],
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A checkpoint folder, a GGUF file, a hub name, or a model of the package."),
    ] = "embedded-hybrid",
    chat: Annotated[bool, typer.Option("--chat", help="For questions in the tokenizer's chat template.")] = False,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens read in one pass; fewer take less memory.", rich_help_panel="Machine")
    ] = 2048,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto.", rich_help_panel="Machine")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ..., or auto for a GPU where there is one.", rich_help_panel="Machine")
    ] = "auto",
    threads: Threads = None,
) -> None:
    """Read a text once and save what the model remembers; `sala generate --open` answers questions about it."""
    prepare(threads)
    from sala import engine
    from sala.engine.saved import read_document, reader_of, save_document
    from sala.errors import require_writable

    require_writable(save)
    console = error_console()
    checkpoint = engine.open_checkpoint(model, dtype, device)
    text = engine.read_documents(files, sys.stdin.buffer).text

    def encode(whole: str) -> list[int]:
        return engine.encode_prompt(checkpoint.tokenizer, whole, checkpoint.config.vocab_size, chat)

    tokens = len(encode(text))
    with counting(console, "weights", checkpoint.num_tensors, "tensors") as one_more:
        network = engine.load(checkpoint, tokens, chunk, lambda name: one_more(1))
    with counting(console, "reading", tokens, "tokens") as more:
        document = read_document(network, text, encode, chunk=chunk, on_tokens=more)
    save_document(save, document, reader_of(network, checkpoint.tokenizer))
    size = engine.human_bytes(save.stat().st_size)
    console.print(f"{save}: {len(document.ids):,} tokens, {size}", soft_wrap=True)
