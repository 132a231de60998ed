"""`sala serve`: answer requests over HTTP, as OpenAI's API does, and a page to read documents with."""

from pathlib import Path
from typing import Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import counting, error_console
from sala.errors import InputError

NET, LIMITS, MACHINE = "Network", "Limits", "Machine"
EXTRA = "expected `pip install 'sala[serve]'`"


def serve(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A checkpoint folder, a GGUF file, a hub name, or a model of the package."),
    ] = "embedded-hybrid",
    host: Annotated[str, typer.Option(help="The address to listen on.", rich_help_panel=NET)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any.", rich_help_panel=NET)] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="A file with one API key a line; clients need one.", rich_help_panel=NET)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients; as --model when left out.", rich_help_panel=NET)
    ] = None,
    documents: Annotated[Path | None, typer.Option(help="A folder to keep documents in that were read.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja file in place of the tokenizer's chat template.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write request bodies to the log.")] = False,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer; what memory allows.", rich_help_panel=LIMITS)
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests worked on at a time.", rich_help_panel=LIMITS)] = 64,
    max_waiting: Annotated[int, typer.Option(min=1, help="Length of the queue.", rich_help_panel=LIMITS)] = 1024,
    max_body: Annotated[str, typer.Option(help="Largest body of a request.", rich_help_panel=LIMITS)] = "64MiB",
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds for an answer, queue included.", rich_help_panel=LIMITS)
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Memory for caches and kept prefixes, like 8GiB; all that is free.", rich_help_panel=MACHINE),
    ] = None,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens of prompts read between two tokens of answers.", rich_help_panel=MACHINE)
    ] = 512,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's own.", rich_help_panel=MACHINE)
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ..., or auto for a GPU where there is one.", rich_help_panel=MACHINE)
    ] = "auto",
    threads: Threads = None,
) -> None:
    """Answer requests over HTTP as OpenAI's API does, and show a page to read documents with."""
    prepare(threads)
    try:
        from sala.serve import server
    except ModuleNotFoundError as error:
        raise InputError(f"`sala serve` needs {error.name}; {EXTRA}") from error
    from sala import engine
    from sala.engine.plan import parse_bytes
    from sala.serve.settings import Settings

    console = error_console()
    template = None
    if chat_template is not None:
        try:
            template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat template {str(chat_template)!r}: {error}; expected a Jinja file") from error
    settings = Settings(
        name=name or model,
        max_length=max_length or 2**40,
        api_keys=() if api_keys is None else server.read_keys(api_keys),
        max_body_bytes=parse_bytes(max_body),
        request_s=timeout,
        documents=documents,
        log_prompts=log_prompts,
    )
    limits = server.EngineLimits(chunk, max_running, max_waiting, None if cache is None else parse_bytes(cache))
    bound = server.listen(host, port)
    checkpoint = engine.open_checkpoint(model, dtype, device)
    with counting(console, "weights", checkpoint.num_tensors, "tensors") as one_more:
        service = server.start(checkpoint, settings, limits, template, lambda name: one_more(1))
    budget = service.engine.budget
    console.print(
        f"{settings.name} on http://{host}:{bound.getsockname()[1]}: {engine.human_bytes(budget.total_bytes)} of cache, "
        f"up to {service.settings.max_length:,} tokens a request",
        soft_wrap=True,
    )
    server.serve(service, bound)
