"""Where the whole parameters of a run's networks are: in the memory of its one process, or in files that all ranks map."""

import mmap
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, nn

from sala.errors import DiskError, writing
from sala.train.parallel import CPU, ONE_PROCESS, World, whole

Module = TypeVar("Module", bound=nn.Module)

PREFIX = ".weights-"
# bytes: tensors begin where torch begins its own, for its kernels may add up in another order elsewhere
ALIGNMENT = 64


class Weights:
    """Gives networks whole float32 parameters on the CPU, in private memory or, with several ranks, in files that they map.

    What is mapped takes room in the page cache, once for all ranks of a host, and none of a rank's own; a number that a rank
    changes in place changes for this rank alone. A file goes when rank 0 has no tensor of it any more, and at the end of
    `with`. All ranks call the methods, with modules of equal structure.

    Args:
        folder: where the files are, which all ranks see; None: private memory.
    """

    def __init__(self, world: World = ONE_PROCESS, folder: Path | None = None):
        self.world, self.folder = world, folder
        # the addresses of each file that tensors are left of
        self._mapped: weakref.WeakKeyDictionary[mmap.mmap, range] = weakref.WeakKeyDictionary()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.folder is not None and self.world.main:
            remove_files(self.folder)

    def unshare(self, module: Module, *, copy: bool = True) -> Module:
        """Give `module` parameters to train, which leaves those of all other modules as they are; return it.

        The numbers are rank 0's.

        copy: False for a module that shares its parameters with none, which may keep them in private memory.

        Raises:
            DiskError: a file cannot be written or read, on any rank.
        """
        parameters = dict(module.named_parameters())
        if self.folder is None:
            for parameter in parameters.values():
                parameter.data = parameter.detach().to(torch.float32, copy=copy)
            return module
        # training renews what is mapped, and writes into none of it
        names = self.world.agree([name for name, parameter in parameters.items() if not self._is_mapped(parameter)])
        self.renew({name: parameters[name] for name in names}, parameters)
        return module

    @torch.no_grad()
    def renew(self, parameters: Mapping[str, nn.Parameter], numbers: Mapping[str, Tensor]) -> None:
        """Give `parameters` the numbers of the tensors of the same names: shards that are gathered one by one, or rank 0's.

        Raises:
            DiskError: a file cannot be written or read, on any rank.
        """
        gathered: Iterator[Tensor] = (whole(numbers[name].detach()).to(CPU, torch.float32) for name in parameters)
        if self.folder is not None and parameters:
            path = self.folder / f"{PREFIX}{self.world.agree(uuid4().hex)}"
            self.world.each(lambda: self._write(path, gathered))
            gathered = iter(self.world.each(lambda: self._map(path, [p.shape for p in parameters.values()])))
        for parameter, tensor in zip(parameters.values(), gathered, strict=True):
            parameter.data = tensor

    def _is_mapped(self, tensor: Tensor) -> bool:
        return any(tensor.data_ptr() in addresses for addresses in self._mapped.values())

    def _write(self, path: Path, tensors: Iterator[Tensor]) -> None:
        try:
            if self.world.main:
                with writing(path), path.open("xb") as file:
                    for tensor in tensors:
                        file.write(tensor.contiguous().numpy().data)
                        file.write(bytes(-tensor.nbytes % ALIGNMENT))
        finally:
            # all ranks are needed to gather a tensor, also when there is no room to write it
            for _ in tensors:
                pass

    def _map(self, path: Path, shapes: Sequence[torch.Size]) -> list[Tensor]:
        try:
            with path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise DiskError(
                f"{str(path)!r} cannot be read on rank {self.world.rank}: {error.strerror}; expected a folder that all "
                "ranks see"
            ) from error
        if self.world.main:
            weakref.finalize(mapping, path.unlink, missing_ok=True)
        tensors, offset = [], 0
        for shape in shapes:
            tensor = torch.frombuffer(mapping, dtype=torch.float32, count=shape.numel(), offset=offset).view(shape)
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
            tensors.append(tensor)
        start = tensors[0].data_ptr()
        self._mapped[mapping] = range(start, start + len(mapping))
        return tensors


def remove_files(folder: Path) -> None:
    """Delete what killed processes left in the folder of a run."""
    for left in folder.glob(f"{PREFIX}*"):
        left.unlink(missing_ok=True)


PRIVATE = Weights()
