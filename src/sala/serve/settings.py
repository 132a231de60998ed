"""What a server is told when it starts."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and names.

    name: of the model, as clients see it. api_keys: one of them is asked for, none where there are none.
    max_length: tokens of prompt and answer together. max_body_bytes, body_s: a body is no larger, and comes within that
    time. request_s: an answer is over by then, None for no limit. keep_alive_s: a stream says something at least that often.
    documents: the folder of saved documents. log_prompts: whether the log holds what people write.
    """

    name: str
    max_length: int
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body_bytes: int = 64 * 2**20
    body_s: float = 60.0
    request_s: float | None = None
    keep_alive_s: float = 10.0
    documents: Path | None = None
    log_prompts: bool = False
