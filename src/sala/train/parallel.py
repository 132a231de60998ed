"""The processes of a run and how they share a stage's work: the only file that knows a mesh.

`torchrun` starts the processes; one process needs nothing. A mesh is dp_replicate x dp_shard x cp ranks: windows are split
over dp_replicate x dp_shard, the tokens of a window over cp, and parameters over dp_shard x cp (FSDP2 `fully_shard`).
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sala.errors import RecipeError
from sala.recipe import Mesh
from sala.train.context import GroupContext

Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")

CPU = torch.device("cpu")
# ranks wait for one that scores a candidate, measures, or writes the model; a sum over ranks has a limit of its own, torch's
PATIENCE = timedelta(hours=12)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor in full; of a sharded one every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, how many there are, and the device it computes on.

    objects: the group by which they tell each other what they found; None: the default one.
    """

    rank: int = 0
    ranks: int = 1
    device: torch.device = CPU
    objects: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in order."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.objects)
        return values

    def agree(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        return self.gather(value)[0]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all ranks, the same on every rank."""
        numbers = torch.tensor(values, dtype=torch.float64)
        if self.ranks > 1:
            dist.all_reduce(numbers)
        return numbers.tolist()

    def all(self, fact: bool) -> bool:
        """Return whether `fact` holds on every rank."""
        return self.sum([not fact]) == [0]

    def each(self, action: Callable[[], Result]) -> Result:
        """Return what `action` returns on this rank, once it is done on all; an error of one rank is every rank's."""
        result: Any = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        for one in self.gather(failure):
            if one is not None:
                raise one
        return result

    def first(self, action: Callable[[], Result]) -> Result:
        """Run `action` on rank 0 while the others wait; its result, or its error, is every rank's."""
        return self.agree(self.each(action if self.main else _nothing))

    def parallel(self, mesh: Mesh, precision: str, place: str = "", field: str = "mesh") -> "Parallel":
        """Return how the processes share a stage; `field` is where its recipe has the mesh.

        Raises:
            RecipeError: the mesh is of another number of processes.
        """
        if mesh.ranks != self.ranks:
            sizes = f"dp_replicate {mesh.dp_replicate}, dp_shard {mesh.dp_shard}, cp {mesh.cp}"
            raise RecipeError(
                f"{place}the mesh is of {mesh.ranks} ranks ({sizes}), and {self.ranks} "
                f"{'process runs' if self.ranks == 1 else 'processes run'}; expected `torchrun --nproc-per-node "
                f"{mesh.ranks} -m sala.cli ...`, or --set '{field}={{dp_shard: {self.ranks}}}'"
            )
        if precision != "float32" and not dist.is_initialized():
            raise RecipeError(
                f"precision {precision!r} needs a process group; expected a run inside of start_world({precision!r}), or float32"
            )
        return Parallel(self, mesh, PRECISIONS[precision])


def _nothing() -> Any:
    """What ranks do while rank 0 works."""


@contextmanager
def start_world(precision: str = "float32") -> Iterator[World]:
    """The processes that torchrun started, or this one; the process group lives inside `with`.

    precision: of the recipe. One process on a CPU needs a group only when parameters and products differ in precision.
    """
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK") or 0)
    device = torch.device("cuda", local) if cuda else CPU
    if cuda:
        torch.cuda.set_device(device)
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    if ranks == 1 and not cuda and precision == "float32":
        yield World()
        return
    # objects, flags and checkpoints travel by gloo, tensors on GPUs by nccl
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if os.environ.get("RANK"):
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(dist.get_rank(), ranks, device, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        dist.destroy_process_group()


class Parallel:
    """How the ranks share one stage."""

    def __init__(self, world: World, mesh: Mesh, dtype: torch.dtype = torch.float32):
        self.world, self.mesh, self.dtype = world, mesh, dtype
        self.context: GroupContext | None = None
        if mesh.cp > 1:
            lines = init_device_mesh(
                world.device.type, (mesh.data_parallel, mesh.cp), mesh_dim_names=("data", "context")
            )
            self.context = GroupContext(lines.get_group("context"))

    @property
    def ranks(self) -> int:
        return self.world.ranks

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def data_rank(self) -> int:
        """Which of the `mesh.data_parallel` parts of a batch is read here; ranks of one context read the same."""
        return self.world.rank // self.mesh.cp

    @property
    def alone(self) -> bool:
        """Whether the stage runs on the model as it is: one process, on the CPU, in float32."""
        return self.ranks == 1 and self.device.type == "cpu" and self.dtype == torch.float32

    def gather(self, value: Any) -> list[Any]:
        return self.world.gather(value)

    def sum(self, values: Sequence[float]) -> list[float]:
        return self.world.sum(values)

    def own_piece(self, row_1N: Tensor) -> Tensor:
        """Return this rank's tokens of a packed row: all without context parallelism, else one of equal parts."""
        return row_1N.chunk(self.mesh.cp, dim=1)[self.world.rank % self.mesh.cp]

    def shard(self, root: Any) -> Any:
        """Return `root` for training: itself when alone, else a copy whose parameters, in float32, are this rank's shards.

        root: a module with `blocks`, the modules that are gathered one at a time. Its own parameters are only read, this
            rank's pieces of them on a CPU, a block at a time on a GPU.
        """
        if self.alone:
            return root
        sharded = shadow(root)
        sizes = {"replicate": self.mesh.dp_replicate, "shard": self.mesh.dp_shard * self.mesh.cp}
        if self.mesh.dp_replicate == 1:
            del sizes["replicate"]
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)),
            "mp_policy": policy,
        }
        for block in sharded.blocks:
            fully_shard(block, **options)
        fully_shard(sharded, **options)
        return sharded.float()


def reshard(root: nn.Module) -> None:
    """Put shards back in the place of parameters that a forward pass without a backward pass has left gathered."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shadow(module: Module, device: torch.device = CPU) -> Module:
    """Return a copy of a module with parameters in the same memory, or on another device than the CPU in memory there.

    Where one of its parameters is moved, converted or sharded, that of `module` stays as it is.
    """
    parameters = {p: nn.Parameter(p.detach().to(device), requires_grad=p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, {id(own): other for own, other in parameters.items()})


ONE_PROCESS = World()
ALONE = Parallel(ONE_PROCESS, Mesh())
