"""torch.compile, layer by layer, where a C compiler is; one visible log line where it is not."""

import logging
import shutil
from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from sala.errors import BackendError

logger = logging.getLogger("sala.train")

Result = TypeVar("Result")


def _reason_against(mode: str) -> str | None:
    """Return why nothing is compiled, or None."""
    if mode == "off":
        return "the recipe says compile: off"
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return "no C++ compiler found"
    return None


class Compiled:
    """Layers that run compiled until compiling fails; equal layers share one compiled code."""

    def __init__(self, layers: Iterable[nn.Module], mode: Literal["auto", "on", "off"]) -> None:
        """Compile `layers` in place for use inside `with`.

        Raises:
            BackendError: mode "on" without a compiler.
        """
        self.layers = list(layers)
        self.mode = mode
        self.reason = _reason_against(mode)
        if self.reason and mode == "on":
            raise BackendError(f"compile: on, but {self.reason}; install one, or use compile: auto")
        if self.reason and mode == "auto":
            logger.warning("training runs eagerly: %s", self.reason)

    def __enter__(self) -> "Compiled":
        if self.reason is None:
            # a stage has one shape; equal layers differ in parameters only, which are inputs of the graph
            torch._dynamo.reset()
            for layer in self.layers:
                # the forward alone: gathering of parameters and checkpointing happen around it
                layer.forward = torch.compile(layer.forward, dynamic=False)
        return self

    def __exit__(self, *error: object) -> None:
        self._undo()

    def _undo(self) -> None:
        for layer in self.layers:
            vars(layer).pop("forward", None)

    def run(self, step: Callable[[], Result]) -> Result:
        """Return `step()`; when compiling fails in it, mode "auto" logs the reason and runs it once more, eagerly."""
        try:
            return step()
        except TorchDynamoException as error:
            if self.reason is not None:
                raise
            summary = " ".join(str(error).split())[:300]
            if self.mode == "on":
                raise BackendError(f"compile: on, but compiling failed: {summary}; use compile: auto") from error
            self.reason = "compiling failed"
            logger.warning("training runs eagerly: compiling failed (%s: %s)", type(error).__name__, summary)
            self._undo()
            return step()
