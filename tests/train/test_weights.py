"""What a rank holds of a network: its shards, and for all else files that the ranks map."""

import ctypes
import gc
import resource
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from runs import small_runs as runs
from sala.data import Document, load_tokenizer
from sala.errors import DiskError
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.model.families import load_model
from sala.recipe import Mesh, Optimizer
from sala.runs import RunOptions, Scorers, run_recipe
from sala.train.batches import read_corpus
from sala.train.loop import run_stage
from sala.train.parallel import Parallel, World, shadow
from sala.train.weights import PREFIX, Weights
from train import ranks

on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory as Linux tells it")


def large(kind: str, words: int, width: int, layers: int) -> MiniCPMSALAForCausalLM:
    """Return a model of 64 * width^2 * layers bytes in float32, and hardly more; `kind` is the first layer's."""
    config = MiniCPMSALAConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        mixer_types=[kind] + ["attention"] * (layers - 1),
        attn_use_rope=True,
        attn_use_output_gate=False,
    )
    return MiniCPMSALAForCausalLM(config)


class Private:
    """Bytes of memory that this process has for itself, beyond those at the start: now, and the most of them in `with`."""

    def __init__(self) -> None:
        # of parameters this small too, what is freed is given back, as it always is of large ones
        ctypes.CDLL(None).mallopt(-3, 65_536)
        self.most, self.start = 0, 0
        self.start = self.now()
        self._done, self._thread = threading.Event(), threading.Thread(target=self._watch)

    def __enter__(self) -> "Private":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def now(self) -> int:
        ctypes.CDLL(None).malloc_trim(0)
        return self._read()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, self._read())

    def _read(self) -> int:
        # without pages of files: those are the system's, which shares them and can do without
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(fields["RssAnon"].split()[0]) - self.start


def size_of(model: nn.Module) -> int:
    return sum(4 * parameter.numel() for parameter in model.parameters())


def stage_of_a_checkpoint(world: World, folder: Path, files: Path | None) -> dict[str, float]:
    """Train a layer of a checkpoint; return private memory by the model's size in float32."""
    stage = ranks.stage_of("next_token", 1, trainable="linear_attention", micro_batch=1, activation_checkpointing=True)
    with Weights(world, files) as weights, Private() as private:
        model = weights.unshare(load_model(folder, dtype="stored"), copy=False)
        loaded, parallel = private.now(), Parallel(world, Mesh(dp_shard=2))
        before = model.model.layers[0].self_attn.q_proj.weight.clone()
        run_stage(
            model,
            stage,
            ranks.Feed(parallel.data_rank, 2),
            optimizer=Optimizer(),
            observer=lambda progress: None,
            compile_mode="off",
            parallel=parallel,
            weights=weights,
        )
        gc.collect()
        trained = private.now()
    assert not torch.equal(before, model.model.layers[0].self_attn.q_proj.weight)
    taken = {"loaded": loaded, "most": private.most, "trained": trained}
    return {name: num_bytes / size_of(model) for name, num_bytes in taken.items()}


@on_linux
def test_a_stage_on_two_ranks_takes_half_a_model_of_each(tmp_path: Path) -> None:
    large("lightning-attn", ranks.X, 320, 12).bfloat16().save_pretrained(tmp_path)
    for taken in ranks.spawn(2, stage_of_a_checkpoint, tmp_path, tmp_path, tmp_path):
        assert taken["loaded"] < 0.1
        # half of every parameter; beside it gathered layers, what trains one layer, activations
        assert taken["most"] < 0.5 + 0.6
        assert taken["trained"] < 0.2


def conversion(world: World, given: Any, folder: Path, out: Path) -> list[float]:
    """Convert the teacher in `folder`; return private memory by its size while layers are scored, and at the end."""
    tokenizer = load_tokenizer(folder)
    corpus = read_corpus(tokenizer, [Document("a.py", runs.TEXT)])
    private, taken = Private(), []
    teacher = load_model(folder, dtype="stored")

    def score(candidate: Any) -> float:
        taken.append(private.now() / size_of(candidate))
        return candidate.model.layers[0].self_attn.q_proj.weight[0, 0].item()

    hybrid = run_recipe(
        given,
        out,
        tokenizer=tokenizer,
        model=teacher,
        scorers=Scorers(score, score),
        data=corpus,
        world=world,
        options=RunOptions(save_every=100),
    )
    return [*taken, private.now() / size_of(hybrid)]


@on_linux
def test_a_conversion_on_two_ranks_holds_no_model_between_its_stages(tmp_path: Path) -> None:
    runs.prepare(tmp_path)
    tokenizer, out = load_tokenizer(tmp_path), tmp_path / "run"
    large("attention", len(tokenizer), 448, 4).bfloat16().save_pretrained(tmp_path)
    rows = [runs.row("align", "align", 1), runs.row("distill", "distill", 1, sparse=True)]
    given = runs.recipe("conversion", tmp_path, mesh={"dp_shard": 2}, stages=rows)
    for taken in ranks.spawn(2, conversion, tmp_path, given, tmp_path, out):
        assert len(taken) > 2
        # libraries: 15 to 25 MB, whatever the model
        assert max(taken) < 0.7
    assert not list(out.glob(f"{PREFIX}*"))


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def shared_modules(world: World, folder: Path) -> dict[str, Any]:
    torch.manual_seed(world.rank)
    seen: dict[str, Any] = {}
    files = lambda: len(list(folder.glob(f"{PREFIX}*")))  # noqa: E731
    with Weights(world, folder) as weights:
        first = nn.Linear(3, 5).bfloat16()
        seen["drawn"] = tensors_of(first)
        weights.unshare(first)
        seen["owned"] = tensors_of(first)
        both = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
        both[0].load_state_dict(first.state_dict(), assign=True)
        weights.unshare(both)
        seen["shares"] = both[0].weight.data_ptr() == first.weight.data_ptr()
        seen["second"], seen["files"] = tensors_of(both[1]), world.first(files)
        with torch.no_grad():
            first.bias += world.rank
        world.gather(None)
        seen["changed"] = first.bias.detach() - seen["owned"][1]
        # by shards
        sharded = fully_shard(shadow(both), mesh=init_device_mesh("cpu", (world.ranks,)))
        for parameter in sharded.parameters():
            parameter.data *= 2
        weights.renew(dict(both.named_parameters()), dict(sharded.named_parameters()))
        seen["renewed"], seen["left"] = tensors_of(both), tensors_of(first)
        del first, sharded
        seen["files then"] = world.first(files)
    world.gather(None)
    return seen | {"files at the end": files(), "still": tensors_of(both)}


def test_ranks_have_one_set_of_parameters(tmp_path: Path) -> None:
    main, other = ranks.spawn(2, shared_modules, tmp_path, tmp_path)
    same = partial(torch.testing.assert_close, rtol=0, atol=0)
    assert not torch.equal(main["drawn"][0], other["drawn"][0])
    for seen in (main, other):
        same(seen["owned"], [tensor.float() for tensor in main["drawn"]])
        same(seen["second"], main["second"])
        assert seen["shares"] and seen["files"] == 2
        same(seen["renewed"][:1] + seen["renewed"][2:], [2 * x for x in (main["owned"][0], *main["second"])])
        same(seen["still"], seen["renewed"])
        same(seen["left"][0], main["owned"][0])
        assert (seen["files then"], seen["files at the end"]) == (1, 0)
    same(main["changed"], torch.zeros(5))
    same(other["changed"], torch.ones(5))


def full_disk(world: World, folder: Path) -> str:
    module = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    sharded = fully_shard(shadow(module), mesh=init_device_mesh("cpu", (world.ranks,)))
    if world.main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        with Weights(world, folder) as weights:
            weights.renew(dict(module.named_parameters()), dict(sharded.named_parameters()))
    except DiskError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        return str(error)
    return "nothing"


def test_a_disk_without_room_is_one_error_on_all_ranks(tmp_path: Path) -> None:
    main, other = ranks.spawn(2, full_disk, tmp_path, tmp_path)
    assert main == other
    assert main.startswith(f"'{tmp_path}/{PREFIX}") and main.endswith("' cannot be written: File too large")
    assert not list(tmp_path.glob(f"{PREFIX}*"))
