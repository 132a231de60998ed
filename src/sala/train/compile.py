"""How layers run in a stage: compiled one by one where a C compiler is (one visible log line where not), checkpointed around it."""

import logging
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint

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
    """Layers that run compiled until compiling fails, checkpointed or not; equal layers share one compiled code."""

    def __init__(
        self, layers: Iterable[nn.Module], mode: Literal["auto", "on", "off"], checkpointed: Iterable[nn.Module] = ()
    ) -> None:
        """Compile `layers` in place for use inside `with`.

        Args:
            checkpointed: layers that keep only what enters them, and compute the rest again for the backward pass.

        Raises:
            BackendError: mode "on" without a compiler.
        """
        self.layers, self.checkpointed = list(layers), list(checkpointed)
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
        self._change_forwards()
        return self

    def __exit__(self, *error: object) -> None:
        self._restore_forwards()

    def _change_forwards(self) -> None:
        # the forward alone: gathering of parameters happens around it
        if self.reason is None:
            for layer in self.layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)
        # a checkpoint within compiled code would leave the whole layer eager, as some operators break its graph
        for layer in self.checkpointed:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def _restore_forwards(self) -> None:
        for layer in (*self.layers, *self.checkpointed):
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
            self._restore_forwards()
            self._change_forwards()
            return step()
