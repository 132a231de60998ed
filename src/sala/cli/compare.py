"""`sala compare`: what two models, or more, say to the same prompts."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import error_console


def compare(
    models: Annotated[list[str], typer.Argument(help="Two checkpoints or more: folders, GGUF files, names.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What is asked. May be repeated.")],
    file: Annotated[
        list[str] | None,
        typer.Option("--file", "-f", help="What is read before each prompt, as for `sala generate`. May be repeated."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the text into each tokenizer's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of drawn answers.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for each checkpoint's own.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, ..., or auto for a GPU where there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
    threads: Threads = None,
) -> None:
    """Ask models the same prompts and print their answers side by side, with times and the cache's size."""
    prepare(threads)
    from sala.demo.answers import answers
    from sala.engine import human_bytes, read_documents
    from sala.errors import InputError

    if len(models) < 2:
        raise InputError(f"{len(models)} model; expected two checkpoints or more")
    console = error_console()
    document = read_documents(file, sys.stdin.buffer).text if file else ""
    said = list(
        answers(
            models,
            prompt,
            document=document,
            chat=chat,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            dtype=dtype,
            device=device,
            say=console.print,
        )
    )
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in said], indent=1, ensure_ascii=False))
        return
    for asked in dict.fromkeys(prompt):
        typer.echo(f"> {asked}")
        for one in said:
            if one.prompt == asked:
                typer.echo(
                    f"\n{one.model} ({one.prompt_tokens:,} tokens read, {one.first_token_s:.2f} s to the first token, "
                    f"{one.tokens_per_s:.1f} tokens/s, cache {human_bytes(one.cache_bytes)}):\n{one.text}"
                )
        typer.echo("")
