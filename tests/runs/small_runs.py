"""Small whole runs in processes of their own, which end themselves as if killed, at a moment of the caller's choice."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sala.runs
from sala.data import Document, Record, load_tokenizer, train_tokenizer, write_shards
from sala.errors import SalaError
from sala.model.families import load_model
from sala.recipe import Recipe, Stage, parse_recipe
from sala.runs import Origin, RunOptions, Scorers, run_recipe
from sala.runs.run import new_model
from sala.train import World, passes
from sala.train.batches import Data, Feed, WindowBatch, read_corpus, read_data
from sala.train.loop import Progress

TEXT = "def read(path):\n    return open(path).read()\n" * 40
SPARSE = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 16, "topk": 2, "dense_len": 32}
TEACHER = {
    "attn_use_rope": True,
    "attn_use_output_gate": False,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
HYBRID = TEACHER | {
    "attn_use_rope": False,
    "attn_use_output_gate": True,
    "mixer_types": ["lightning-attn", "attention", "lightning-attn"],
    "sparse_config": SPARSE,
}


def row(name: str, loss: str, steps: int, **changes: Any) -> dict[str, Any]:
    numbers = {"length": 48, "batch": 2, "steps": steps, "learning_rate": {"peak": 1e-3}, "data": {"text": 1}}
    return {"name": name, "loss": loss} | numbers | changes


def recipe(kind: str, folder: Path, **changes: Any) -> Any:
    """Return a recipe that trains a new model, converts one, or trains one on shards."""
    tasks = {"text": [1, 0.5], "noise_retrieval": 1}
    rows = {
        "new": {
            "model": HYBRID,
            "stages": [
                row("dense", "next_token", 4, data=tasks),
                row("sparse", "next_token", 4, sparse=True, optimizer={"kind": "muon"}),
            ],
        },
        "conversion": {
            "conversion": {
                "keep": {"count": 1},
                "output_norm_init": "measured",
                "logits_scaling": 64,
                "sparse": SPARSE,
            },
            "stages": [
                row("align", "align", 3),
                row("distill", "distill", 3),
                row("long", "next_token", 2, sparse=True, logits_scaling=True, length=96),
            ],
        },
        "shards": {
            "model": HYBRID,
            "sources": {"web": {"shards": str(folder / "web")}, "code": {"shards": str(folder / "code")}},
            "optimizer": {"kind": "muon"},
            "stages": [
                row("short", "next_token", 4, data={"web": [1, 2], "code": 1}),
                row("long", "next_token", 3, data={"web": 1}, length=96),
            ],
        },
    }[kind]
    return parse_recipe({"name": kind, "compile": "off"} | rows | changes)


def prepare(folder: Path) -> None:
    """Write the tokenizer, the teacher and the shards that the recipes need."""
    tokenizer = train_tokenizer([Document("a.py", TEXT)], vocab_size=300)
    new_model(parse_recipe(recipe("new", folder).resolved | {"model": TEACHER}), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for source, lengths in (("web", range(2, 40)), ("code", range(5, 90, 3))):
        texts = (Record(f"{length}", {"text": TEXT[: 5 * length]}) for length in lengths)
        write_shards(texts, tokenizer, folder / source)


@dataclass
class Noting:
    """Data that notes in a file which documents each batch holds."""

    data: Data
    log: Path
    spoil: int | None

    def feed(self, stage: Stage, seed: int, rank: int = 0, ranks: int = 1) -> Any:
        return NotingFeed(self.data.feed(stage, seed, rank, ranks), self.log, self.spoil)

    def describe(self) -> dict[str, str]:
        return self.data.describe()


@dataclass
class NotingFeed:
    feed: Feed
    log: Path
    spoil: int | None
    drawn: int = 0

    def __next__(self) -> WindowBatch:
        batch = next(self.feed)
        self.drawn += 1
        if self.drawn == self.spoil:
            row = passes.LOSSES["next_token"]
            passes.LOSSES["next_token"] = dataclasses.replace(
                row, of=lambda *given: (row.of(*given)[0] * math.nan, None)
            )
        note(self.log, {"batch": batch.names})
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.feed.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.feed.load_state_dict(state)


def note(log: Path, what: Any) -> None:
    with log.open("a") as file:
        file.write(json.dumps(what) + "\n")


class Signal:
    """Sends this process a signal at the `at`-th step, measurement or operation on the files of a run; counts them."""

    OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.listdir", "os.scandir")

    def __init__(self, out: Path, at: int | None, number: int):
        self.out, self.at, self.number, self.moments = str(out), at, number, 0
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.OPERATIONS and str(arguments[0]).startswith(self.out):
            self.moment()

    def moment(self) -> None:
        self.moments += 1
        if self.moments == self.at:
            os.kill(os.getpid(), self.number)


class Full:
    """A disk that takes no new file of a run from the `at`-th on."""

    def __init__(self, out: Path, at: int):
        self.inside, self.at, self.files = f"{out}/", at, 0
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(self.inside) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.files += 1
            if self.files >= self.at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def work(
    world: World,
    given: Recipe,
    folder: Path,
    out: Path,
    *,
    at: int | None = None,
    on_rank: int = 0,
    number: int = signal.SIGKILL,
    spoil: int | None = None,
    full: int | None = None,
    **options: Any,
) -> int | str:
    """Start a run, or go on with it; return its moments (see `Signal`), or why it stopped, after the exit code.

    at: the moment of rank `on_rank` at which it gets signal `number`; none without. spoil: its batch whose loss is NaN.
    full: see `Full`, on that rank.
    """
    log = out.with_name(f"{out.name}-{world.rank}.jsonl")
    here = world.rank == on_rank
    sent = Signal(out, at if here else None, number)
    if full is not None and here:
        Full(out, full)
    tokenizer = load_tokenizer(folder)

    def observe(progress: Progress) -> None:
        note(log, {"stage": progress.stage, "step": progress.step})
        sent.moment()

    def say(text: str) -> None:
        sent.moment()
        note(log, {"said": text, "known": sorted(path.name for path in (out / "measured").glob("layer_scores-*"))})

    corpus = read_corpus(tokenizer, [Document("a.py", TEXT)])
    model = load_model(folder) if hasattr(given, "conversion") else None
    sample = torch.from_numpy(corpus.text[:40])[None]

    def score(candidate: Any) -> float:
        return candidate(sample, use_cache=False).logits.std().item()

    try:
        run_recipe(
            given,
            out,
            tokenizer=tokenizer,
            model=model,
            origin=Origin(str(folder)),
            scorers=Scorers(score, score),
            data=Noting(read_data(given, tokenizer) if given.sources else corpus, log, spoil if here else None),
            observer=observe,
            say=say,
            world=world,
            options=RunOptions(**{"save_every": 2} | options),
        )
    except SalaError as error:
        return f"{error.exit_code} {error}"
    return sent.moments


@dataclass(frozen=True)
class Outcome:
    """What a finished run is: its steps, its weights, and the documents of each step, as every start of it read them."""

    steps: list[tuple[Any, ...]]
    weights: str
    batches: dict[tuple[str, int], set[tuple[str, ...]]]


def outcome(out: Path, ranks: int = 1) -> Outcome:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [(r["stage"], r["step"], r["loss"], r["gradient_norm"], *r["layer_errors"]) for r in rows]
    batches: dict[tuple[str, int], set[tuple[str, ...]]] = {}
    for rank in range(ranks):
        names: tuple[str, ...] = ()
        for line in out.with_name(f"{out.name}-{rank}.jsonl").read_text().splitlines():
            event = json.loads(line)
            if "batch" in event:
                names = (str(rank), *event["batch"])
            elif "step" in event:
                batches.setdefault((event["stage"], event["step"]), set()).add(names)
    return Outcome(steps, weights_of(out / "final"), batches)


def weights_of(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def export(world: World, run: Path, out: Path, resume: Any) -> Progress:
    return sala.runs.export(run, out, resume=resume)
