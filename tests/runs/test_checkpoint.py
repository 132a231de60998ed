"""Checkpoints: complete or absent, the same bits on any number of ranks, and damage said, never read."""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sala.errors import CheckpointError, DiskError
from sala.runs import checkpoint
from sala.runs.checkpoint import Checkpoints, Saved
from sala.train.parallel import World
from train import ranks

EARLIER, LATER = "step-0000000010", "step-0000000020"


def values(step: int) -> dict[str, Any]:
    """A state of odd shapes and all kinds of numbers that differs from step to step."""
    numbers = torch.arange(35.0).reshape(7, 5) + step
    return {
        "model": {
            "weight": numbers,
            "narrow": numbers.bfloat16().t(),
            "row": numbers[:1] * 3,
            "count": torch.tensor(step),
        },
        "optimizer": {
            "state": {0: {"moment": numbers.double() / 3}},
            "bytes": numbers.to(torch.uint8),
            "none": numbers[:0],
        },
    }


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    return checkpoint._flat(state)


def blank(state: dict[str, Any]) -> dict[str, Any]:
    return {key: blank(value) if isinstance(value, dict) else torch.zeros_like(value) for key, value in state.items()}


def same_bits(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    one, other = flat(found), flat(expected)
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].contiguous().view(torch.uint8), other[name].contiguous().view(torch.uint8))
        for name in one
        if one[name].dim()
    )


def read(checkpoints: Checkpoints, saved: Saved) -> dict[str, Any]:
    state = blank(values(0))
    checkpoints.load(saved, state)
    return state


def names(folder: Path) -> list[str]:
    """What stands in a folder of checkpoints, hidden or not, but for the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != checkpoint.LOCK)


@pytest.fixture
def saved_twice(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "run", asynchronous=False)
    for step in (10, 20):
        checkpoints.save(step, values(step), {"step": step})
    return checkpoints


def test_loaded_bits_are_the_saved_bits(tmp_path: Path) -> None:
    state = values(3)
    state["model"]["weight"][2, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    checkpoints = Checkpoints(tmp_path / "run")
    facts = {"stage": "long", "position": {"epoch": 1, "loss": 0.1}}
    checkpoints.save(7, state, facts)
    checkpoints.wait()
    saved = Checkpoints(tmp_path / "run").newest()
    assert saved is not None and (saved.step, saved.facts) == (7, facts)
    assert saved.folder == tmp_path / "run" / "step-0000000007"
    found = read(Checkpoints(tmp_path / "run"), saved)
    assert same_bits(found, state) and found["model"]["count"] == 3


def test_parameters_are_loaded_in_place(tmp_path: Path) -> None:
    layer, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    checkpoints.save(1, layer.state_dict(), {})
    saved = checkpoints.newest()
    assert saved is not None
    checkpoints.load(saved, dict(other.named_parameters()))
    assert torch.equal(other.weight, layer.weight) and torch.equal(other.bias, layer.bias)


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent").newest() is None
    assert not (tmp_path / "absent").exists()


def hold_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let writing begin only once the event is set."""
    written, event = checkpoint._write, threading.Event()
    monkeypatch.setattr(checkpoint, "_write", lambda *args: event.wait(60) and written(*args))
    return event


def test_tensors_may_change_as_soon_as_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event = hold_back(monkeypatch)
    checkpoints, state = Checkpoints(tmp_path), values(4)
    checkpoints.save(4, state, {})
    for tensor in flat(state).values():
        tensor.zero_()
    event.set()
    checkpoints.wait()
    saved = checkpoints.newest()
    assert saved is not None and same_bits(read(checkpoints, saved), values(4))


def test_a_checkpoint_appears_when_it_is_written_and_polled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event = hold_back(monkeypatch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, values(10), {})
    checkpoints.poll()
    assert checkpoints.newest() is None and names(tmp_path) == [f".writing-{EARLIER}"]
    event.set()
    assert checkpoints._writing is not None
    checkpoints._writing.written.result()
    assert checkpoints.newest() is None
    checkpoints.poll()
    assert names(tmp_path) == [EARLIER]


def test_a_save_finishes_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, values(10), {})
    checkpoints.save(20, values(20), {})
    assert EARLIER in names(tmp_path) and LATER not in names(tmp_path)
    checkpoints.wait()
    assert names(tmp_path) == [EARLIER, LATER]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in range(1, 7):
        checkpoints.save(step, values(step), {})
    checkpoints.wait()
    assert names(tmp_path) == [f"step-{step:010}" for step in (4, 5, 6)]


def test_of_a_step_saved_again_the_later_counts(saved_twice: Checkpoints) -> None:
    for again in (21, 22):
        saved_twice.save(20, values(again), {"again": again})
        saved_twice.wait()
        saved = saved_twice.newest()
        assert saved is not None and (saved.step, saved.facts) == (20, {"again": again})
        assert same_bits(read(saved_twice, saved), values(again))
    assert names(saved_twice.folder) == [EARLIER, f"{LATER}-3"]


def test_a_state_may_change_its_shape_between_saves(tmp_path: Path) -> None:
    # as from one stage of a run to the next
    checkpoints = Checkpoints(tmp_path, keep=3, asynchronous=False)
    states = [{"a": torch.arange(3.0)}, {"a": torch.arange(4.0), "b": torch.ones(2)}, {"a": torch.arange(4, 0, -1)}]
    for step, state in enumerate(states):
        checkpoints.save(step, state, {})
        found, saved = blank(state), checkpoints.newest()
        assert saved is not None
        checkpoints.load(saved, found)
        assert same_bits(found, state)


def change(path: Path, work: Callable[[bytearray], None]) -> None:
    content = bytearray(path.read_bytes())
    work(content)
    path.write_bytes(content)


def truncate(folder: Path) -> str:
    size = (folder / "__0_0.distcp").stat().st_size
    change(folder / "__0_0.distcp", lambda content: content.__delitem__(slice(1000, None)))
    return rf"__0_0\.distcp has 1,000 bytes; manifest\.json says {size:,}"


def flip(folder: Path) -> str:
    change(folder / "__0_0.distcp", lambda content: content.__setitem__(1234, content[1234] ^ 1))
    return r"__0_0\.distcp has changed: sha256 [0-9a-f]{64}; manifest\.json says [0-9a-f]{64}"


def flip_the_metadata(folder: Path) -> str:
    change(folder / ".metadata", lambda content: content.__setitem__(-2, content[-2] ^ 1))
    return r"\.metadata has changed: sha256 [0-9a-f]{64}; manifest\.json says [0-9a-f]{64}"


def lose_a_file(folder: Path) -> str:
    size = (folder / "__0_0.distcp").stat().st_size
    (folder / "__0_0.distcp").unlink()
    return rf"__0_0\.distcp is missing; manifest\.json says {size:,} bytes"


def lose_the_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return r"manifest\.json is missing"


def cut_the_manifest(folder: Path) -> str:
    change(folder / "manifest.json", lambda content: content.__delitem__(slice(50, None)))
    return r"manifest\.json is not JSON: .*"


def edit_the_facts(folder: Path) -> str:
    text = (folder / "manifest.json").read_text()
    assert '"step": ' in text
    (folder / "manifest.json").write_text(text.replace('"step": ', '"step": 1'))
    return r"manifest\.json has changed: sha256 [0-9a-f]{64}, and it says [0-9a-f]{64}"


def another_format(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    return r"its format is 1, and this version of sala reads format 2"


def no_format(folder: Path) -> str:
    (folder / "manifest.json").write_text("[]")
    return r"manifest\.json does not say its format"


DAMAGES = [
    truncate,
    flip,
    flip_the_metadata,
    lose_a_file,
    lose_the_manifest,
    cut_the_manifest,
    edit_the_facts,
    another_format,
    no_format,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_said_and_the_one_before_is_used_only_when_asked_for(
    saved_twice: Checkpoints, damage: Callable[[Path], str]
) -> None:
    newest = saved_twice.folder / LATER
    said = damage(newest)
    with pytest.raises(
        CheckpointError, match=rf"^{newest} cannot be resumed from: {said}; --resume previous would use {EARLIER}$"
    ):
        saved_twice.newest()
    saved = saved_twice.newest("previous")
    assert saved is not None and saved.step == 10 and same_bits(read(saved_twice, saved), values(10))


def test_damage_of_the_only_one(saved_twice: Checkpoints) -> None:
    shutil.rmtree(saved_twice.folder / EARLIER)
    said = truncate(saved_twice.folder / LATER)
    with pytest.raises(CheckpointError, match=rf": {said}; there is no checkpoint before it$"):
        saved_twice.newest()


def test_damage_of_the_previous(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3, asynchronous=False)
    for step in (5, 10, 20):
        checkpoints.save(step, values(step), {})
    said = flip(tmp_path / EARLIER)
    advice = f"with {EARLIER} deleted, --resume previous would use step-0000000005"
    with pytest.raises(CheckpointError, match=rf"^{tmp_path / EARLIER} cannot be resumed from: {said}; {advice}$"):
        checkpoints.newest("previous")


def test_previous_needs_two(saved_twice: Checkpoints, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(
        CheckpointError, match=rf"^--resume previous: {absent} holds no checkpoint, and none before it$"
    ):
        Checkpoints(absent).newest("previous")
    shutil.rmtree(saved_twice.folder / EARLIER)
    said = f"--resume previous: {saved_twice.folder} holds only {LATER}, and none before it"
    with pytest.raises(CheckpointError, match=f"^{said}$"):
        saved_twice.newest("previous")


def test_a_run_resumed_before_the_newest_leaves_that_history(saved_twice: Checkpoints) -> None:
    checkpoints = Checkpoints(saved_twice.folder, asynchronous=False)
    saved = checkpoints.newest("previous")
    assert saved is not None
    read(checkpoints, saved)
    # looking and loading delete nothing
    assert names(checkpoints.folder) == [EARLIER, LATER]
    checkpoints.save(15, values(15), {})
    assert names(checkpoints.folder) == [EARLIER, "step-0000000015"]


def test_a_run_that_was_not_resumed_replaces_nothing(saved_twice: Checkpoints) -> None:
    other = Checkpoints(saved_twice.folder)
    said = f"{saved_twice.folder / LATER} is later, and this run was not resumed; resume it, or name another folder"
    with pytest.raises(CheckpointError, match=f"^a checkpoint of step 15 cannot be started: {said}$"):
        other.save(15, values(15), {})
    assert names(saved_twice.folder) == [EARLIER, LATER]


def test_what_killed_runs_left_is_ignored_then_removed(saved_twice: Checkpoints) -> None:
    folder = saved_twice.folder
    for name in (".writing-step-0000000030", ".deleted-step-0000000005"):
        shutil.copytree(folder / LATER, folder / name)
    (folder / "notes").mkdir()
    checkpoints = Checkpoints(folder, asynchronous=False)
    saved = checkpoints.newest()
    assert saved is not None and saved.step == 20 and len(names(folder)) == 5
    checkpoints.claim()
    assert names(folder) == ["notes", EARLIER, LATER]


def test_a_folder_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    said = rf"{checkpoints.folder} cannot be written: \[Errno 20\] Not a directory: .*"
    with pytest.raises(DiskError, match=f"^{said}$"):
        checkpoints.claim()
    with pytest.raises(DiskError, match=r"^a checkpoint of step 1 cannot be started: \[Errno 20\] Not a directory: "):
        checkpoints.save(1, {}, {})


def test_copies_that_cannot_be_made_leave_nothing(saved_twice: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any) -> None:
        raise MemoryError("12 GB")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint._Staging, "stage", no_memory)
        with pytest.raises(CheckpointError, match=r"^a checkpoint of step 30 cannot be started: MemoryError: 12 GB$"):
            saved_twice.save(30, values(30), {})
    assert saved_twice.newest() is not None
    saved_twice.save(30, values(30), {})
    assert names(saved_twice.folder) == [LATER, "step-0000000030"]


def fail_to_write(*args: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "finish", [Checkpoints.poll, Checkpoints.wait, lambda checkpoints: checkpoints.save(40, {}, {})]
)
def test_an_error_while_writing_is_said_and_the_rest_stays(
    saved_twice: Checkpoints, monkeypatch: pytest.MonkeyPatch, finish: Callable[[Checkpoints], None]
) -> None:
    checkpoints = Checkpoints(saved_twice.folder)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", fail_to_write)
        checkpoints.save(30, values(30), {})
        assert checkpoints._writing is not None
        checkpoints._writing.written.exception()
    said = (
        rf"the checkpoint of step 30 could not be written to {checkpoints.folder}: \[Errno 28\] No space left on device"
    )
    with pytest.raises(DiskError, match=f"^{said}$"):
        finish(checkpoints)
    assert names(checkpoints.folder) == [EARLIER, LATER]
    checkpoints.save(30, values(30), {})
    checkpoints.wait()
    assert names(checkpoints.folder) == [LATER, "step-0000000030"]


def test_further_files_are_kept_and_checked(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    checkpoints.save(1, values(1), {}, {"notes.txt": b"a word"})
    saved = checkpoints.newest()
    assert saved is not None and (saved.folder / "notes.txt").read_bytes() == b"a word"
    (saved.folder / "notes.txt").write_bytes(b"a wort")
    with pytest.raises(CheckpointError, match=r"notes\.txt has changed"):
        checkpoints.newest()


def test_an_error_while_publishing_is_said_and_the_rest_stays(
    saved_twice: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "write_manifest", fail_to_write)
    said = (
        rf"the checkpoint of step 30 could not be written to {saved_twice.folder}: \[Errno 28\] No space left on device"
    )
    with pytest.raises(DiskError, match=f"^{said}$"):
        saved_twice.save(30, values(30), {})
    assert names(saved_twice.folder) == [EARLIER, LATER]


def test_a_limit_of_the_file_system_is_such_an_error(saved_twice: Checkpoints) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    said = rf"the checkpoint of step 30 could not be written to {saved_twice.folder}: \[Errno 27\] File too large"
    try:
        with pytest.raises(DiskError, match=f"^{said}$"):
            saved_twice.save(30, {"weight": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(saved_twice.folder) == [EARLIER, LATER]


def test_a_state_must_fit(saved_twice: Checkpoints) -> None:
    saved = saved_twice.newest()
    assert saved is not None

    def refused(said: str, **changes: Tensor | None) -> None:
        state = blank(values(0))
        state["model"] = {key: value for key, value in (state["model"] | changes).items() if value is not None}
        with pytest.raises(CheckpointError, match=f"^{saved.folder} cannot be loaded: {said}$"):
            saved_twice.load(saved, state)
        # nothing was read
        assert all(not tensor.any() for tensor in flat(state).values())

    names = {name: torch.zeros(1) for name in "abcd"}
    refused(r"it does not have model\.a, model\.b, model\.c and 1 more", **names)
    refused(r"it has model\.count, model\.row, which nothing here takes", count=None, row=None)
    refused(
        r"its model\.row is torch\.float32 of shape \(1, 5\); here it is torch\.float32 of \(5,\)", row=torch.zeros(5)
    )
    refused(
        r"its model\.count is torch\.int64 of shape \(\); here it is torch\.float32 of \(\)", count=torch.tensor(0.0)
    )


def test_what_a_checkpoint_cannot_hold_is_refused_before_it_starts(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run", asynchronous=False)
    facts = "a state holds tensors, and anything else goes into the facts"
    with pytest.raises(TypeError, match=rf"^optimizer\.lr is a float; {facts}$"):
        checkpoints.save(1, {"optimizer": {"lr": 0.1}}, {})
    with pytest.raises(TypeError, match=rf"^weight is without numbers \(meta\); {facts}$"):
        checkpoints.save(1, {"weight": torch.empty(3, device="meta")}, {})
    with pytest.raises(ValueError, match=r"^two tensors are called a\.b$"):
        checkpoints.save(1, {"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}, {})
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        checkpoints.save(1, {}, {"loss": torch.zeros(1)})
    with pytest.raises(ValueError, match="^keep is 0; expected 1 or more$"):
        Checkpoints(tmp_path, keep=0)
    assert not (tmp_path / "run").exists()


def test_steps_go_on(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, {}, {})
    # also while the one before is under way
    with pytest.raises(ValueError, match="^step 1 is saved after step 2$"):
        checkpoints.save(1, {}, {})
    assert names(tmp_path) == ["step-0000000002"]


def sharded(step: int, placements: list[Any], mesh: Any) -> dict[str, Any]:
    """The state of `step` over a mesh of two ranks, a plain tensor, and a tensor of each rank's own."""
    state = values(step)
    model = {name: distribute_tensor(value, mesh, placements) for name, value in state["model"].items() if value.dim()}
    own = {str(dist.get_rank()): torch.full((2,), step + dist.get_rank())}
    return {"model": model | {"count": state["model"]["count"]}, "optimizer": state["optimizer"], "own": own}


def whole(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: whole(value) if isinstance(value, dict) else value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in state.items()
    }


def error_of(work: Callable[[], Any]) -> str:
    with pytest.raises((CheckpointError, DiskError)) as caught:
        work()
    return str(caught.value)


def step_twice(folder: Path, mesh: Any, world: World) -> list[Tensor]:
    """Return the weight that a sharded module has after its second step, and after resuming from its first."""
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 7)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(module.parameters())
    checkpoints, weights = Checkpoints(folder, world=world), []

    def step() -> None:
        optimizer.zero_grad()
        module(torch.full((2, 5), 1.0 + dist.get_rank())).square().sum().backward()
        optimizer.step()

    def state() -> dict[str, Any]:
        moments = {name: optimizer.state[parameter] for name, parameter in module.named_parameters()}
        return {"model": module.state_dict(), "optimizer": moments}

    step()
    checkpoints.save(1, state(), {})
    step()
    weights.append(module.weight.full_tensor().detach())
    checkpoints.wait()
    saved = checkpoints.newest()
    assert saved is not None
    checkpoints.load(saved, state())
    step()
    return [*weights, module.weight.full_tensor().detach()]


def two_ranks(world: World, folder: Path) -> dict[str, Any]:
    """Return what one of two ranks finds, for the tests below."""
    rank = world.rank
    mesh = init_device_mesh("cpu", (2,))
    checkpoints = Checkpoints(folder / "two", world=world)
    for step in (10, 20):
        state = sharded(step, [Shard(0)], mesh)
        checkpoints.save(step, state, {"step": step, "rank": rank})
        for tensor in flat(state).values():
            tensor.zero_()
    while checkpoints._writing is not None:
        checkpoints.poll()
    found: dict[str, Any] = {}
    for placement in (Shard(0), Shard(1), Replicate()):
        state = sharded(1, [placement], mesh)
        saved = checkpoints.newest()
        assert saved is not None
        checkpoints.load(saved, state)
        found[repr(placement)] = whole(state)
    found["facts"] = saved.facts
    replicas = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp_replicate", "dp_shard"))
    Checkpoints(folder / "replicas", world=world, asynchronous=False).save(
        6, sharded(6, [Replicate(), Shard(0)], replicas), {}
    )
    found["of one"] = blank(values(0))
    alone = Checkpoints(folder / "one", world=world)
    saved_alone = alone.newest()
    assert saved_alone is not None
    alone.load(saved_alone, found["of one"])
    found["sharded module"] = step_twice(folder / "module", mesh, world)
    # a rank alone is slow
    write, event = checkpoint._write, threading.Event()
    checkpoint._write = (lambda *args: event.wait(60) and write(*args)) if rank == 1 else write
    slow = Checkpoints(folder / "slow", world=world)
    slow.save(7, sharded(7, [Shard(0)], mesh), {})
    if rank == 0:
        assert slow._writing is not None
        slow._writing.written.result()
    slow.poll()
    found["while slow"] = names(folder / "slow")
    dist.barrier()
    event.set()
    slow.wait()
    found["after slow"] = names(folder / "slow")
    # a rank alone fails: to write, and to find a tensor
    checkpoint._write = fail_to_write if rank == 1 else write
    checkpoints.save(30, sharded(30, [Shard(0)], mesh), {})
    found["write"] = error_of(checkpoints.wait)
    checkpoint._write = write
    found["names"] = names(folder / "two")
    extra = {"extra": torch.zeros(1)} if rank == 1 else {}
    found["load"] = error_of(lambda: checkpoints.load(saved, sharded(1, [Shard(0)], mesh) | extra))
    dist.barrier()
    if rank == 0:
        shutil.copytree(folder / "two", folder / "damaged")
        truncate(folder / "damaged" / LATER)
    dist.barrier()
    found["damaged"] = error_of(Checkpoints(folder / "damaged", world=world).newest)
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that two ranks have worked in, and what each found."""
    folder = tmp_path_factory.mktemp("pair")
    Checkpoints(folder / "one", asynchronous=False).save(5, values(5), {})
    return folder, ranks.spawn(2, two_ranks, folder, folder)


Pair = tuple[Path, list[dict[str, Any]]]


def test_two_ranks_resume_on_two_with_any_placement(pair: Pair) -> None:
    for rank, found in enumerate(pair[1]):
        for placement in (Shard(0), Shard(1), Replicate()):
            state = found[repr(placement)]
            assert torch.equal(state.pop("own")[str(rank)], torch.full((2,), 20 + rank))
            assert same_bits(state, values(20)) and state["model"]["count"] == 20
        assert found["facts"] == {"step": 20, "rank": 0}


def test_a_sharded_module_and_its_optimizer_go_on_as_if_nothing_had_happened(pair: Pair) -> None:
    for found in pair[1]:
        uninterrupted, resumed = found["sharded module"]
        assert torch.equal(uninterrupted, resumed)


@pytest.mark.parametrize(("name", "step"), [("two", 20), ("replicas", 6)])
def test_two_ranks_resume_on_one(pair: Pair, name: str, step: int) -> None:
    checkpoints = Checkpoints(pair[0] / name)
    saved = checkpoints.newest()
    state = blank(values(0)) | {"own": {"0": torch.zeros(2).long(), "1": torch.zeros(2).long()}}
    assert saved is not None
    checkpoints.load(saved, state)
    own = state.pop("own")
    assert same_bits(state, values(step)) and own["0"].tolist() == [step] * 2 and own["1"].tolist() == [step + 1] * 2


def test_one_rank_resumes_on_two(pair: Pair) -> None:
    assert all(same_bits(found["of one"], values(5)) for found in pair[1])


def test_what_is_the_same_on_all_ranks_is_written_once(pair: Pair) -> None:
    def times_written(name: str) -> list[int]:
        (folder,) = (pair[0] / name).glob(f"step-*{20 if name == 'two' else 6}")
        written = [index.fqn for index in checkpoint.FileSystemReader(folder).read_metadata().storage_data]
        return [written.count(name) for name in ("model.weight", "model.count", "optimizer.state.0.moment")]

    assert times_written("two") == [2, 1, 1] and times_written("replicas") == [1, 1, 1]


def test_a_checkpoint_waits_for_the_slowest_rank(pair: Pair) -> None:
    name = "step-0000000007"
    assert [found["while slow"] for found in pair[1]] == [[f".writing-{name}"]] * 2
    assert [found["after slow"] for found in pair[1]] == [[name]] * 2


def test_an_error_on_one_rank_is_the_same_error_on_all(pair: Pair) -> None:
    folder, found = pair
    failed = f"the checkpoint of step 30 could not be written to {folder / 'two'} on rank 1: [Errno 28] No space left on device"
    assert [rank["write"] for rank in found] == [failed] * 2
    assert [rank["names"] for rank in found] == [[EARLIER, LATER]] * 2
    missing = f"{folder / 'two' / LATER} cannot be loaded on rank 1: it does not have extra"
    assert [rank["load"] for rank in found] == [missing] * 2
    assert found[0]["damaged"] == found[1]["damaged"]
    start = f"{folder / 'damaged' / LATER} cannot be resumed from on rank "
    assert found[0]["damaged"].startswith(start)
    assert found[0]["damaged"].endswith(f"; --resume previous would use {EARLIER}")


def filled(step: int) -> dict[str, Tensor]:
    return {name: torch.full((10_000,), step) for name in ("weight", "moment")}


def save_forever(folder: Path, started: Connection) -> None:
    """Resume and save step after step, as a run does, until killed; say when each save has started."""
    torch.set_num_threads(1)
    checkpoints, last = Checkpoints(folder), 0
    if saved := checkpoints.newest():
        state = filled(-1)
        checkpoints.load(saved, state)
        last = saved.step
        assert all(torch.equal(state[name], tensor) for name, tensor in filled(last).items())
    for step in itertools.count(last + 1):
        checkpoints.save(step, filled(step), {"step": step})
        started.send(step)


def test_a_killed_run_leaves_complete_checkpoints(tmp_path: Path) -> None:
    moments, steps = random.Random(0), [0]
    for _ in range(8):
        here, there = ranks.PROCESSES.Pipe()
        process = ranks.PROCESSES.Process(target=save_forever, args=(tmp_path, there))
        process.start()
        there.close()
        # once the second has started, the first is complete
        assert [here.recv(), here.recv()] == [steps[-1] + 1, steps[-1] + 2]
        process.join(moments.uniform(0.01, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        checkpoints, state = Checkpoints(tmp_path), filled(-1)
        saved = checkpoints.newest()
        assert saved is not None and saved.step > steps[-1] and saved.facts == {"step": saved.step}
        checkpoints.load(saved, state)
        assert all(torch.equal(state[name], tensor) for name, tensor in filled(saved.step).items())
        steps.append(saved.step)
    checkpoints.save(steps[-1] + 1, filled(0), {})
    checkpoints.wait()
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def die_before_operation(folder: Path, count: int) -> None:
    """Kill this process as it is about to open, make, rename, list or remove something in `folder` for the count-th time."""
    left = iter(range(count - 1))

    def operation(event: str, args: tuple[Any, ...]) -> None:
        if args and str(args[0]).startswith(str(folder)) and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(operation)


def die_everywhere(folder: Path) -> None:
    """Let processes that save three times die, each one operation later than the one before; note what they left."""
    torch.set_num_threads(1)
    left: list[int] = []
    for count in itertools.count(1):
        place = folder / str(count)
        child = os.fork()
        if child == 0:
            checkpoints = Checkpoints(place, keep=1, asynchronous=False)
            checkpoints.save(1, filled(1), {"filled": 1})
            die_before_operation(place, count)
            checkpoints.save(2, filled(2), {"filled": 2})
            checkpoints.save(2, filled(3), {"filled": 3})
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        checkpoints, state = Checkpoints(place), filled(-1)
        saved = checkpoints.newest()
        assert saved is not None
        checkpoints.load(saved, state)
        assert all(torch.equal(state[name], tensor) for name, tensor in filled(saved.facts["filled"]).items())
        left.append(saved.facts["filled"])
        if status == 0:
            break
    (folder / "left.json").write_text(json.dumps(left))


def test_killed_before_any_operation_a_run_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    with ranks.another_process(die_everywhere, tmp_path):
        pass
    left = json.loads((tmp_path / "left.json").read_text())
    assert left == sorted(left) and all(left.count(step) > 5 for step in (1, 2, 3))


def save_once(folder: Path) -> None:
    Checkpoints(folder, asynchronous=False).save(1, {}, {})


def test_a_folder_in_use_is_read_but_not_written(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with ranks.another_process(save_once, tmp_path):
        assert checkpoints.newest() is not None
        said = f"{tmp_path} is in use by another process; end that process first"
        with pytest.raises(CheckpointError, match=f"^a checkpoint of step 2 cannot be started: {said}$"):
            checkpoints.save(2, {}, {})
    checkpoints.save(2, {}, {})
    checkpoints.wait()
    assert names(tmp_path) == ["step-0000000001", "step-0000000002"]
