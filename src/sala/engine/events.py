"""What goes into the engine and comes out of it: what is asked, events of a request, counts."""

from collections.abc import Callable
from dataclasses import dataclass

from sala.engine.answer import AnswerOptions, TokenLogprob
from sala.engine.request import Finish
from sala.errors import SalaError


class EngineStoppedError(SalaError):
    """The engine takes no requests any more."""


@dataclass(frozen=True, slots=True)
class Started:
    """Reading begins. cached: tokens of the prompt that need not be read; miss: why not more."""

    cached: int
    miss: str


@dataclass(frozen=True, slots=True)
class Progress:
    """So many tokens of the prompt are read."""

    read: int
    total: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is certain, the tokens drawn since the last piece, and what was asked of their probabilities."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is over. new_tokens counts the end token; blocks: attention to each block that was chosen."""

    finish: Finish
    new_tokens: int
    prompt_tokens: int
    cached: int
    miss: str
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    blocks: tuple[float, ...] = ()
    error: str = ""


Event = Started | Progress | Piece | Done
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt and how to answer it.

    on_event: called in the engine's thread; must return at once. ends: lengths at which messages end in the prompt.
    """

    prompt: tuple[int, ...]
    options: AnswerOptions
    on_event: OnEvent
    ends: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """Counts since the start, and of this moment."""

    running: int
    waiting: int
    kept_prefixes: int
    kept_bytes: int
    running_bytes: int
    total_bytes: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    preemptions: int
    evictions: int
    steps: int
    finished: dict[str, int]
    misses: dict[str, int]
