"""From a checkpoint to a server that listens."""

import copy
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn

from sala.engine import Checkpoint
from sala.engine.budget import plan_cache
from sala.engine.engine import Engine
from sala.engine.generate import end_tokens
from sala.engine.runner import Runner
from sala.engine.saved import reader_of
from sala.errors import InputError
from sala.model import MiniCPMSALAForCausalLM
from sala.model.families import load_model
from sala.serve.app import create_app
from sala.serve.documents import Documents
from sala.serve.gate import App
from sala.serve.grammar import Grammars
from sala.serve.prompts import Prompts
from sala.serve.service import Service
from sala.serve.settings import Settings

log = logging.getLogger(__name__)
DRAIN_S = 30


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """See `Engine`; cache_bytes: None for all memory that the plan leaves."""

    chunk: int = 512
    max_running: int = 64
    max_waiting: int = 1024
    cache_bytes: int | None = None


def build(
    checkpoint: Checkpoint,
    network: MiniCPMSALAForCausalLM,
    settings: Settings,
    limits: EngineLimits,
    cache_size: int,
    chat_template: str | None = None,
) -> Service:
    """Return a service whose engine runs; saved documents are open."""
    runner = Runner(network, cache_size, limits.max_running)
    ends = end_tokens(network, checkpoint.tokenizer)
    engine = Engine(
        runner,
        checkpoint.tokenizer,
        ends,
        chunk=limits.chunk,
        max_waiting=limits.max_waiting,
    )
    longest = engine.budget.longest
    if settings.max_length > longest:
        settings = replace(settings, max_length=longest)
    engine.start()
    vocab_size = checkpoint.config.vocab_size
    prompts = Prompts(copy.deepcopy(checkpoint.tokenizer), vocab_size, chat_template)
    grammars = Grammars(copy.deepcopy(checkpoint.tokenizer), sorted(ends), vocab_size, network.device)
    reader = None if settings.documents is None else reader_of(network, checkpoint.tokenizer)
    documents = Documents(engine, prompts, settings.documents, reader)
    for reason in documents.open_folder():
        log.warning("%s", reason)
    return Service(engine, prompts, grammars, documents, checkpoint.generation, settings)


def start(
    checkpoint: Checkpoint,
    settings: Settings,
    limits: EngineLimits,
    chat_template: str | None = None,
    on_tensor: Callable[[str], None] = lambda name: None,
) -> Service:
    """Load a checkpoint and return a service whose engine runs."""
    size = plan_cache(checkpoint, limits.chunk, limits.cache_bytes)
    network = load_model(checkpoint.folder, dtype=checkpoint.dtype, device=checkpoint.device, on_tensor=on_tensor)
    return build(checkpoint, network, settings, limits, size, chat_template)


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket: before minutes of loading it is known whether the port is free.

    Raises:
        InputError: it is not, or there is no such host.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"host {host!r}, port {port}: {error}; expected an address of this machine and a free port"
        ) from error
    return bound


def configured(app: App) -> uvicorn.Server:
    """Return a server of an application; SIGTERM and Ctrl-C let it finish what it has begun."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_S,
        lifespan="on",
    )
    return uvicorn.Server(config)


def serve(service: Service, bound: socket.socket) -> None:
    """Answer requests until a signal comes."""
    configured(create_app(service)).run(sockets=[bound])


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the API keys of a file, one a line.

    Raises:
        InputError: it cannot be read, or has none.
    """
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"keys {str(path)!r}: {error}; expected a file with one key a line") from error
    if not keys:
        raise InputError(f"keys {str(path)!r}: no key in it; expected one a line")
    return keys
