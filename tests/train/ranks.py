"""Small stages, run by any number of gloo processes."""

import dataclasses
import multiprocessing as mp
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sala.convert.align import LinearTwins
from sala.convert.transfer import hybrid_config, linear_twin, unshare
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.recipe import Mesh, Optimizer, Stage
from sala.train.batches import WindowBatch
from sala.train.loop import Progress, run_stage
from sala.train.parallel import Parallel, World

X, LENGTH, BATCH = 40, 48, 4
SPARSE = {
    "kernel_size": 4,
    "kernel_stride": 2,
    "init_blocks": 1,
    "block_size": 8,
    "window_size": 8,
    "topk": 3,
    "dense_len": 0,
}


def tiny(*mixers: str, seed: int = 0) -> MiniCPMSALAForCausalLM:
    torch.manual_seed(seed)
    config = MiniCPMSALAConfig(
        vocab_size=X,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=len(mixers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mixer_types=list(mixers),
        sparse_config=SPARSE,
        attn_use_rope="minicpm4" not in mixers,
        initializer_range=0.2,
    )
    return MiniCPMSALAForCausalLM(config).eval()


def models(loss: str) -> tuple[Any, Any]:
    """Return what a stage with this loss trains, and its teacher."""
    teacher = tiny("attention", "attention", "attention", seed=1)
    if loss == "align":
        config = hybrid_config(teacher.config, ["lightning-attn"] * 3, rope=True, gates=False)
        generator = torch.Generator().manual_seed(0)
        return LinearTwins(
            teacher,
            [unshare(linear_twin(layer.self_attn, config, "random", generator)) for layer in teacher.model.layers],
        ), None
    return tiny("lightning-attn", "minicpm4", "lightning-attn"), teacher if loss == "distill" else None


def stage_of(loss: str, steps: int = 8, **changes: Any) -> Stage:
    values = {
        "name": loss,
        "loss": loss,
        "length": LENGTH,
        "batch": BATCH,
        "steps": steps,
        "learning_rate": {"peak": 3e-3},
        "data": {"text": 1},
    }
    return Stage.model_validate(values | changes)


def packed(step: int) -> WindowBatch:
    """Windows of several documents, one with padding at its end."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(X, (BATCH, LENGTH), generator=generator)
    weights, padding = torch.ones(BATCH, LENGTH), torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    # documents end inside a rank's part, on its border, and span several
    ends = ((20, 48), (24, 48), (48,), (1, 30, 48))
    for row, row_ends in enumerate(ends):
        weights[row, [0, *row_ends[:-1]]] = 0
    weights[3, 30:], padding[3, 30:] = 0, True
    return WindowBatch(ids, weights, tuple(f"window {row}" for row in range(BATCH)), ends, padding)


def lopsided(step: int) -> WindowBatch:
    """The same, but the first half of the windows, a rank's share, is padding, and the rest is padded unequally."""
    batch = packed(step)
    weights, padding = batch.loss_weights.clone(), torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    for row, real in enumerate((0, 0, LENGTH, 1 + step)):
        weights[row, real:], padding[row, real:] = 0, True
    return dataclasses.replace(batch, loss_weights=weights, padding=padding)


class Feed:
    """Every rank's own windows of `packed`, or of other batches."""

    def __init__(self, rank: int, ranks: int, batches: Callable[[int], WindowBatch] = packed):
        self.rank, self.ranks, self.batches, self.step = rank, ranks, batches, 0

    def __next__(self) -> WindowBatch:
        batch = self.batches(self.step)
        self.step += 1
        share = BATCH // self.ranks
        return batch.rows(self.rank * share, (self.rank + 1) * share)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Any) -> None:
        self.step = state["step"]


def run(
    world: World,
    mesh: Mesh,
    stage: Stage,
    precision: torch.dtype = torch.float32,
    *,
    saver: Any = None,
    batches: Callable[[int], WindowBatch] = packed,
) -> tuple[list[Progress], Any]:
    """Run a stage and return its steps and the model."""
    torch.set_num_threads(1)
    model, teacher = models(stage.loss)
    parallel, seen = Parallel(world, mesh, precision), []
    run_stage(
        model,
        stage,
        Feed(parallel.data_rank, mesh.data_parallel, batches),
        optimizer=stage.optimizer or Optimizer(),
        observer=seen.append,
        teacher=teacher,
        compile_mode="off",
        parallel=parallel,
        saver=saver,
    )
    return seen, model


# forked from a process that has imported what takes long, and runs one thread
PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["sala.train", "sala.convert", "torch.distributed.checkpoint", "tensorboard.summary.writer.record_writer"]
)


def spawn(ranks: int, work: Callable[..., Any], folder: Path, *arguments: Any, **named: Any) -> list[Any]:
    """Return what `work(world, *arguments)` returns on each of `ranks` processes; it is a function of a module."""
    assert (codes := codes_of(ranks, work, folder, *arguments, **named)) == [0] * ranks, codes
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def codes_of(ranks: int, work: Callable[..., Any], folder: Path, *arguments: Any, **named: Any) -> list[int]:
    """Return how the processes ended; with one of them all end, as torchrun does it."""
    (folder / "store").unlink(missing_ok=True)
    processes = [
        PROCESSES.Process(target=_rank, args=(rank, ranks, partial(work, **named), folder, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    waiting = {process.sentinel: process for process in processes}
    while waiting:
        for sentinel in connection.wait(list(waiting)):
            ended = waiting.pop(sentinel)  # type: ignore[call-overload]
            ended.join()
            if ended.exitcode:
                for process in waiting.values():
                    process.kill()
    return [process.exitcode for process in processes]


def _rank(rank: int, ranks: int, work: Callable[..., Any], folder: Path, arguments: Any) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=3))
    torch.save(work(World(rank, ranks), *arguments), folder / f"{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


@contextmanager
def another_process(work: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """A process that has done `work(*arguments)` and lasts until the end of `with`."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_last, args=(there, work, arguments))
    process.start()
    there.close()
    # raises EOFError where the process has died
    here.recv()
    try:
        yield
    finally:
        here.close()
        process.join()
    assert process.exitcode == 0


def _last(there: connection.Connection, work: Callable[..., Any], arguments: Any) -> None:
    work(*arguments)
    there.send(None)
    there.poll(None)
