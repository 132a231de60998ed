"""What a person sees while work goes on: live bars in a terminal, a plain line now and then anywhere else."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# a log file wants to see that work goes on, not every step
PLAIN_LINE_EVERY_S = 10.0


def error_console() -> Console:
    """Return the console of progress and remarks; results go to standard output, so that they can be piped."""
    return Console(stderr=True, highlight=False)


@contextmanager
def counting(console: Console, what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done; gives a function that takes how many more are."""
    started = time.monotonic()
    done, said = 0, started
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(what, total=total, unit=unit, rate="")

    def advance(more: int) -> None:
        nonlocal done, said
        done += more
        now = time.monotonic()
        rate = f"{done / max(now - started, 1e-9):,.0f} {unit}/s"
        bar.update(task, completed=done, rate=rate)
        if not console.is_terminal and now - said >= PLAIN_LINE_EVERY_S:
            said = now
            console.print(f"{what}: {done:,} of {total:,} {unit}, {rate}", soft_wrap=True)
        if done >= total:
            bar.stop()  # what comes next may be the answer, on the same terminal

    with bar:
        yield advance


class Step(Protocol):
    """What a display shows of a moment: a step of training has all of it, other work leaves out what it has not."""

    @property
    def stage(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def learning_rate(self) -> float | None: ...
    @property
    def gradient_norm(self) -> float | None: ...
    @property
    def tokens_per_s(self) -> float | None: ...
    @property
    def seconds_left(self) -> float | None: ...
    @property
    def mfu(self) -> float | None: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def validation_loss(self) -> float | None: ...


class Rows(Progress):
    """Bars with a line below them, which tells of the work that goes on more than a row has room for."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Padding(Text(self.below, style="dim"), (0, 0, 0, 2))


class Display:
    """The stages of a run: a row each with step, loss and time left, and below them what else the last step says.

    Remarks stand above the rows. In a pipe or a file a step is one line.

    quiet: show nothing: another process of the run does.
    """

    def __init__(self, console: Console, quiet: bool = False):
        self.console = Console(quiet=True) if quiet else console
        console = self.console
        self._rows: dict[str, TaskID] = {}
        self._bars = Rows(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
            disable=not console.is_terminal,
        )
        # of each stage, from its last look
        self._validation: dict[str, float] = {}
        self._shown = ""
        self._said_at = float("-inf")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.below = ""  # no more work goes on
        self._bars.stop()

    def say(self, text: str) -> None:
        """Show a line that stays."""
        self.console.print(text, soft_wrap=True, markup=False)

    def observe(self, step: Step, phase: str | None = None) -> None:
        """Show where a stage is.

        phase: its short stages share one row; None gives the stage a row of its own that stays.
        """
        if step.validation_loss is not None:
            self._validation[step.stage] = step.validation_loss
        losses = (*_loss(step), *self._validated(step))
        if self.console.is_terminal:
            row = phase or step.stage
            if row not in self._rows:
                self._rows[row] = self._bars.add_task(row, total=step.steps, facts="")
            self._bars.below = ", ".join(_below(step))
            facts = ", ".join((*losses, *_time_left(step)))
            self._bars.update(self._rows[row], completed=step.step, total=step.steps, facts=facts)
            return
        now, name = time.monotonic(), f"{phase}: {step.stage}" if phase else step.stage
        first, last = name != self._shown, phase is None and step.step == step.steps
        if (phase is None and first) or last or now - self._said_at >= PLAIN_LINE_EVERY_S:
            self._said_at, self._shown = now, name
            told = (*losses, *_below(step), *_time_left(step))
            self.say(", ".join((f"{name}: step {step.step} of {step.steps}", *told)))

    def _validated(self, step: Step) -> Iterator[str]:
        if step.stage in self._validation:
            yield f"validation {self._validation[step.stage]:.4f}"


def _loss(step: Step) -> Iterator[str]:
    if step.loss is not None:
        yield f"loss {step.loss:.4f}"


def _below(step: Step) -> Iterator[str]:
    if step.learning_rate is not None:
        yield f"lr {step.learning_rate:.1e}"
    if step.gradient_norm is not None:
        yield f"grad norm {step.gradient_norm:.3g}"
    if step.tokens_per_s is not None:
        yield f"{step.tokens_per_s:,.0f} tokens/s"
    if step.mfu is not None:
        yield f"MFU {step.mfu:.1%}"
    if step.memory_bytes:
        from sala.engine import human_bytes

        yield f"memory {human_bytes(step.memory_bytes)}"


def _time_left(step: Step) -> Iterator[str]:
    if step.seconds_left is not None and step.step < step.steps:
        yield f"{duration(step.seconds_left)} left"


def duration(seconds: float) -> str:
    """Return a time as a person says it: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
