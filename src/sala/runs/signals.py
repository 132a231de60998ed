"""SIGTERM and Ctrl-C, answered between two steps of a run."""

import signal
import threading
import time
from types import FrameType
from typing import Any

from sala.errors import SalaError


class Interrupted(SalaError):
    """A signal came; the run is saved, and the same command goes on."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


class Signals:
    """SIGTERM and Ctrl-C are noted and answered after the step; a second one, later, ends the process as usual.

    torchrun passes on to every process what a scheduler may have sent to it too: at once, that is the same signal.
    """

    WATCHED = (signal.SIGTERM, signal.SIGINT)
    AT_ONCE_S = 3.0

    def __init__(self) -> None:
        self.number = 0
        self._noted_at = 0.0
        self._own: dict[int, Any] = {}

    def watch(self) -> None:
        # only the main thread may; a run in another one is stopped by its caller
        if threading.current_thread() is threading.main_thread():
            self._own = {number: signal.signal(number, self._note) for number in self.WATCHED}

    def leave(self) -> None:
        for number, handler in self._own.items():
            signal.signal(number, handler)
        self._own = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._noted_at = number, time.monotonic()
        elif time.monotonic() - self._noted_at > self.AT_ONCE_S:
            self.leave()
            signal.raise_signal(number)
