"""Small whole runs in processes of their own, which end themselves as if killed, at a moment of the caller's choice."""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sala.convert import halo
from sala.data import Document, Record, load_tokenizer, train_tokenizer, write_shards
from sala.model.families import load_model
from sala.train import RunOptions, Scorers, World, parse_recipe, train
from sala.train.batches import Data, Feed, WindowBatch, read_corpus, read_data
from sala.train.loop import Progress
from sala.train.recipe import Recipe, Stage
from sala.train.run import new_model

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

    def feed(self, stage: Stage, seed: int, rank: int = 0, ranks: int = 1) -> Any:
        return NotingFeed(self.data.feed(stage, seed, rank, ranks), self.log)

    def describe(self) -> dict[str, str]:
        return self.data.describe()


@dataclass
class NotingFeed:
    feed: Feed
    log: Path

    def __next__(self) -> WindowBatch:
        batch = next(self.feed)
        note(self.log, {"batch": batch.names})
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.feed.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.feed.load_state_dict(state)


def note(log: Path, what: Any) -> None:
    with log.open("a") as file:
        file.write(json.dumps(what) + "\n")


class Death:
    """Ends the process, as kill -9 does, at the `at`-th step, measurement or operation on the files of a run; counts them."""

    OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.listdir", "os.scandir")

    def __init__(self, out: Path, at: int | None):
        self.out, self.at, self.moments = str(out), at, 0
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.OPERATIONS and str(arguments[0]).startswith(self.out):
            self.moment()

    def moment(self) -> None:
        self.moments += 1
        if self.moments == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def work(
    world: World,
    given: Recipe,
    folder: Path,
    out: Path,
    death: tuple[int, int | None] = (0, None),
    options: RunOptions = RunOptions(save_every=2),  # noqa: B008
    poison: Callable[[World, Any], None] | None = None,
) -> int:
    """Start a run, or go on with it, and return its moments.

    death: the rank that dies, and at which moment.
    """
    log = out.with_name(f"{out.name}-{world.rank}.jsonl")
    last = Death(out, death[1] if world.rank == death[0] else None)
    tokenizer = load_tokenizer(folder)

    def observe(progress: Progress) -> None:
        note(log, {"stage": progress.stage, "step": progress.step})
        last.moment()

    def say(text: str) -> None:
        last.moment()
        note(log, {"said": text, "known": sorted(path.name for path in (out / "measured").glob("layer_scores-*"))})

    corpus = read_corpus(tokenizer, [Document("a.py", TEXT)])
    model = load_model(folder) if hasattr(given, "conversion") else None
    data = Noting(read_data(given, tokenizer) if given.sources else corpus, log)
    if poison is not None:
        poison(world, data)
    sample = torch.from_numpy(corpus.text[:40])[None]

    def score(model: Any) -> float:
        return model(sample, use_cache=False).logits.std().item()

    train(
        given,
        out,
        tokenizer=tokenizer,
        model=model,
        scorers=Scorers(halo, score, score),
        data=data,
        observer=observe,
        say=say,
        world=world,
        options=options,
    )
    return last.moments


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
    weights = hashlib.sha256((out / "final" / "model.safetensors").read_bytes()).hexdigest()
    return Outcome(steps, weights, batches)
