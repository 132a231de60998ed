"""The choices of one HTTP request while the engine works on them."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from sala.engine.answer import AnswerOptions
from sala.engine.engine import Engine
from sala.engine.events import Asked, Done, Event
from sala.serve.problem import Problem
from sala.serve.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Asking:
    """One choice: a prompt and how to answer it."""

    prompt: Prompt
    options: AnswerOptions


class Answers:
    """Events of several choices as they come. Use in `async with`: what is not over when it ends is cancelled."""

    def __init__(self, engine: Engine, asking: Sequence[Asking], *, request_s: float | None, keep_alive_s: float):
        self.engine, self.asking = engine, asking
        self.keep_alive_s = keep_alive_s
        self.deadline = None if request_s is None else time.monotonic() + request_s
        self.request_s = request_s
        self.names: list[str] = []
        self.open: set[int] = set()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def __aenter__(self) -> "Answers":
        loop = asyncio.get_running_loop()

        def teller(index: int):
            return lambda event: loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        asked = [
            Asked(each.prompt.ids, each.options, teller(index), each.prompt.ends)
            for index, each in enumerate(self.asking)
        ]
        submitting = asyncio.ensure_future(asyncio.to_thread(self.engine.submit_all, asked))
        try:
            self.names = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            # the client left meanwhile
            for name in await submitting:
                self.engine.cancel(name)
            raise
        self.open = set(range(len(self.names)))
        return self

    async def __aexit__(self, *reason: object) -> None:
        for index in self.open:
            self.engine.cancel(self.names[index])

    async def events(self) -> AsyncIterator[tuple[int, Event] | None]:
        """Yield (choice, event) until all are over; None where nothing came for `keep_alive_s`.

        Raises:
            Problem: time is up, or the engine failed.
        """
        while self.open:
            wait_s = self.keep_alive_s
            if self.deadline is not None:
                wait_s = min(wait_s, self.deadline - time.monotonic())
                if wait_s <= 0:
                    raise Problem(504, f"no answer within {self.request_s:g} s; expected a shorter prompt or answer")
            try:
                index, event = await asyncio.wait_for(self._events.get(), wait_s)
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Done):
                self.open.discard(index)
                if event.finish == "error":
                    raise Problem(500, f"the model failed: {event.error}")
                if event.finish == "cancelled":
                    raise Problem(503, "the server is shutting down; expected another try later")
            yield index, event
