"""What the demo tells whoever watches it."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

PHASES = {
    "convert": "Convert the teacher",
    "retrieval": "Ask for what was hidden",
    "latency": "Measure time and memory",
    "needle": "Find one needle in a long document",
    "report": "Write the report",
}


@dataclass(frozen=True, slots=True)
class Moment:
    """One step of a stage; what does not apply to the stage is None.

    phase: a key of `PHASES`. stage: in "convert" a stage of the recipe, else the phase's own name: a row of a display.
    detail: which model and length is at work, or "".
    seconds_left: of the stage. memory_bytes: 0 where nobody watches it.
    """

    phase: str
    stage: str
    step: int
    steps: int
    detail: str = ""
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens_per_s: float | None = None
    seconds_left: float | None = None
    mfu: float | None = None
    memory_bytes: int = 0
    validation_loss: float | None = None


Observer = Callable[[Moment], None]
Say = Callable[[str], None]


class Meter:
    """Counts the steps of a phase and tells the time left; work is in any unit that time is proportional to."""

    def __init__(self, observer: Observer, phase: str, steps: int, work: float):
        self.observer, self.phase, self.steps, self.work = observer, phase, steps, work
        self.started = perf_counter()
        self.step, self.done = 0, 0.0

    def advance(self, detail: str, work: float, tokens_per_s: float | None = None) -> None:
        self.step += 1
        self.done += work
        left = (perf_counter() - self.started) * max(0.0, self.work - self.done) / self.done
        self.observer(
            Moment(
                self.phase,
                self.phase,
                self.step,
                self.steps,
                detail=detail,
                tokens_per_s=tokens_per_s,
                seconds_left=left,
            )
        )
