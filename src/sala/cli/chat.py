"""`sala chat`: a conversation in the terminal, about files or about nothing; what was read stays read."""

import queue
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from sala.cli.options import Threads, prepare
from sala.cli.progress import counting, error_console
from sala.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from sala.engine.answer import AnswerOptions
    from sala.engine.engine import Engine

CLEAR, QUIT = "/clear", "/quit"


def chat(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A checkpoint folder, a GGUF file, a hub name, or a model of the package."),
    ] = "embedded-hybrid",
    file: Annotated[
        list[str] | None,
        typer.Option("--file", "-f", help="A file, folder or glob to talk about. May be repeated."),
    ] = None,
    system: Annotated[str, typer.Option(help="What the model is told before all else.")] = "",
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes drawn answers repeatable.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", "-n", help="Longest answer.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens read in one pass.", rich_help_panel="Machine")] = 2048,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto.", rich_help_panel="Machine")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ..., or auto for a GPU where there is one.", rich_help_panel="Machine")
    ] = "auto",
    threads: Threads = None,
) -> None:
    """Talk with a model: a line is a question, Ctrl-C stops the answer, /clear forgets all, /quit or Ctrl-D leaves."""
    prepare(threads)
    from sala import engine
    from sala.engine.answer import AnswerOptions
    from sala.engine.budget import plan_cache
    from sala.engine.conversation import Conversation
    from sala.engine.engine import Engine
    from sala.engine.generate import end_tokens
    from sala.engine.runner import Runner

    console = error_console()
    checkpoint = engine.open_checkpoint(model, dtype, device)
    sampling = engine.sampling_for(
        checkpoint.generation, temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens
    )
    if file and "-" in file:
        raise InputError("--file -: standard input is where questions come from; expected a file, a folder or a glob")
    document = engine.read_documents(file, sys.stdin.buffer).text if file else ""
    conversation = Conversation(checkpoint.tokenizer, checkpoint.config.vocab_size, document, system)
    length = len(conversation.ask("a")) + sampling.max_new_tokens
    conversation.clear()
    cache_size = plan_cache(checkpoint, chunk)
    with counting(console, "weights", checkpoint.num_tensors, "tensors") as one_more:
        network = engine.load(checkpoint, length, chunk, lambda name: one_more(1))
    running = Engine(
        Runner(network, cache_size, max_running=1),
        checkpoint.tokenizer,
        end_tokens(network, checkpoint.tokenizer),
        chunk=chunk,
    )
    running.start()
    try:
        while (question := _question()) is not None:
            if question == CLEAR:
                conversation.clear()
            elif question:
                answer = _answer(running, conversation.ask(question), AnswerOptions(sampling), console)
                conversation.answered(answer)
    finally:
        running.stop(drain=False)


@contextmanager
def _on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Inside `with`, do this on Ctrl-C."""
    before = signal.signal(signal.SIGINT, lambda number, frame: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _question() -> str | None:
    """Return the next line, None at the end; Ctrl-C drops what was typed of it."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return ""
    return None if line == QUIT else line


def _answer(running: "Engine", prompt: list[int], options: "AnswerOptions", console: "Console") -> str:
    """Write an answer as it comes and return it; Ctrl-C stops it."""
    from sala.engine.events import Done, Event, Piece, Progress, Started

    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    name = running.submit(prompt, options, events.put)
    text, read = "", 0
    with _on_interrupt(lambda: running.cancel(name)), counting(console, "reading", len(prompt), "tokens") as more:
        while True:
            event = events.get()
            if isinstance(event, (Started, Progress)):
                now = event.cached if isinstance(event, Started) else event.read
                # what is written after an interruption is read again too
                more(max(0, min(now, len(prompt)) - read))
                read = max(read, now)
            elif isinstance(event, Piece):
                text += event.text
                sys.stdout.write(event.text)
                sys.stdout.flush()
            elif isinstance(event, Done):
                break
    sys.stdout.write("\n")
    sys.stdout.flush()
    if event.finish in ("cancelled", "error"):
        console.print("stopped" if event.finish == "cancelled" else f"the model failed: {event.error}")
    return text
