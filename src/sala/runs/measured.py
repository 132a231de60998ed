"""What a run has measured or decided, so that a run that is started again does not do it again."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sala.errors import InputError
from sala.runs.record import write_whole
from sala.train.parallel import ONE_PROCESS, World


class Measured:
    """Results by name, a JSON file each, shared by all ranks. Names fit a file name; floats come back exactly.

    folder: None keeps nothing. between: called by all ranks between measurements; may raise to stop there.
    """

    def __init__(self, folder: Path | None, world: World, between: Callable[[], None] = lambda: None):
        self.folder, self.world, self.between = folder, world, between

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result of `compute`: computed once in the life of a run, on rank 0, the same on all ranks."""
        return self.world.first(lambda: self._recall(name, compute))

    def each(self, name: str, count: int, compute: Callable[[int], Any]) -> list[Any]:
        """Return the results for 0 to count - 1: each computed once in the life of a run, shared out over the ranks."""
        names = [f"{name}-{index:04d}" for index in range(count)]
        missing = self.world.agree([i for i in range(count) if not self._has(names[i])])
        results: dict[int, Any] = {}
        for turn in range(0, len(missing), self.world.ranks):
            mine = missing[turn : turn + self.world.ranks][self.world.rank :][:1]
            results |= self.world.each(partial(self._recall_some, mine, names, compute))
            self.between()
        for others in self.world.gather(results):
            results |= others
        # those of an earlier start may lie on rank 0's disk only
        left = [i for i in range(count) if i not in results]
        results |= self.world.first(partial(self._recall_some, left, names, compute))
        return [results[i] for i in range(count)]

    def _recall_some(self, some: list[int], names: list[str], compute: Callable[[int], Any]) -> dict[int, Any]:
        return {i: self._recall(names[i], partial(compute, i)) for i in some}

    def put(self, name: str, value: Any) -> None:
        """Write down a result, or another in its place."""
        path = self._path(name)
        if path is not None:
            self.world.first(lambda: write_whole(path, f"{json.dumps(value)}\n".encode()))

    def known(self, name: str) -> Any:
        """Return a result that is there already, or None."""
        return self._recall(name, lambda: None) if self._has(name) else None

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.json"

    def _has(self, name: str) -> bool:
        path = self._path(name)
        return path is not None and path.is_file()

    def _recall(self, name: str, compute: Callable[[], Any]) -> Any:
        path = self._path(name)
        if path is not None and path.is_file():
            try:
                return json.loads(path.read_bytes())
            except ValueError as error:
                raise InputError(
                    f"{path} is damaged ({error}); delete it, and the same command makes it again"
                ) from error
        # as JSON gives it back, so that the first start sees what a later one will
        text = json.dumps(compute())
        if path is not None:
            write_whole(path, f"{text}\n".encode())
        return json.loads(text)


NOTHING_KEPT = Measured(None, ONE_PROCESS)
