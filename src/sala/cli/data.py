"""`sala data`: text, JSON lines, Parquet or a data set of the hub become tokenised shards to train on."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import counting, error_console

TEXT, MESSAGES = "text", "messages"


def data(
    out: Annotated[Path, typer.Option(help="A new folder for the shards; it appears once it is complete.")],
    tokenizer: Annotated[
        str, typer.Option(help="The checkpoint whose tokenizer to use: a folder, a hub name, or one of the package.")
    ],
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders and pipes: .jsonl and .parquet hold records, any other file is one document."
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Instead of files, a data set of the Hugging Face hub or a local one, streamed.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="The configuration of --dataset.")] = None,
    split: Annotated[str | None, typer.Option(help='The split of --dataset; "train" when left out.')] = None,
    text_field: Annotated[
        str | None, typer.Option(help='Key of a record\'s text; "text" when left out, "messages" with --chat.')
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Conversations, by the chat template; loss on the assistant's tokens alone.")
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="text, jsonl or parquet, whatever the names of files say; pipes often have none.")
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Read special tokens spelled out in the text as special tokens.")
    ] = False,
    threads: Threads = None,
) -> None:
    """Tokenise documents into memory-mapped shards."""
    prepare(threads)
    if threads is not None:
        # tokenizers starts its threads when it first encodes
        os.environ["RAYON_NUM_THREADS"] = str(threads)
    from sala.data import find_files, load_tokenizer, open_dataset, read_dataset, read_files, write_shards
    from sala.errors import InputError
    from sala.model.checkpoint import find_checkpoint

    if bool(files) == (dataset is not None):
        raise InputError("nothing to tokenise, or too much: give either files or --dataset")
    if dataset is not None and format is not None:
        raise InputError("--format belongs to files; leave it out for --dataset")
    if dataset is None and (config, split) != (None, None):
        raise InputError("--config and --split belong to --dataset; leave them out for files")
    column = text_field or (MESSAGES if chat else TEXT)
    words = load_tokenizer(find_checkpoint(tokenizer))
    console = error_console()
    if dataset is not None:
        source = [name for name in (dataset, config, split or "train") if name]
        rows = read_dataset(open_dataset(dataset, config, split or "train"), dataset)
        # nobody knows how many there are
        with console.status(f"tokenising {dataset}"):
            summary = write_shards(
                rows, words, out, column=column, chat=chat, parse_special=special_tokens, source=source
            )
    else:
        found = find_files(files or [], format)
        if found.links:
            console.print(f"passed over {found.links:,} links that lead out of their folder or to a folder")
        total = sum(path.stat().st_size for path in found.paths)
        with counting(console, "tokenising", total, "bytes") as on_bytes:
            records = read_files(found.paths, column, on_bytes, format)
            summary = write_shards(
                records, words, out, column=column, chat=chat, parse_special=special_tokens, source=files or []
            )
    typer.echo(summary)
    typer.echo(out)
