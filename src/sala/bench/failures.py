"""What fails in a measurement: noted where it happens, and told when everything else has been measured."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sala.errors import SalaError


class MeasurementError(SalaError):
    """Something could not be measured; everything else was."""


class Failures:
    """Rows of `case`, `length`, `who`, `error` and `traceback`; say: told each as it comes."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def noted(self, case: str, who: str, length: int | None = None) -> Iterator[None]:
        """Go on after a failure inside `with`: a device is lent for minutes, and the rest is measured in them."""
        try:
            yield
        except Exception as error:
            text = str(error) if isinstance(error, SalaError) else f"{type(error).__name__}: {error}"
            self.say(f"{case}, {who}: failed: {' '.join(text.split())[:500]}")
            row = {"case": case, "length": length, "who": who, "error": text, "traceback": traceback.format_exc()}
            self.rows.append(row)
