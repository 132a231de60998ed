"""Batches of a stage as tensors: generated tasks and package text, or shards of tokenised documents."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sala.data import (
    Document,
    Mix,
    Shards,
    Source,
    Stream,
    Vocabulary,
    encode_documents,
    encode_stream,
    library_documents,
    vocabulary,
)
from sala.errors import InputError, RecipeError
from sala.recipe import Recipe, Stage


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """Token ids int64 (B, T), the weight of each as a target (B, T), and what each window holds.

    ends: the ends of the packed sequences of each window, in its own tokens, the last one T; None when every window is
        one sequence. padding: (B, T) bool, True on padding; None when there is none.
    """

    input_ids: Tensor
    loss_weights: Tensor
    names: tuple[str, ...]
    ends: tuple[tuple[int, ...], ...] | None = None
    padding: Tensor | None = None

    def rows(self, start: int, end: int) -> "WindowBatch":
        """Return some of the windows, say for a micro-batch."""
        part = slice(start, end)
        return WindowBatch(
            self.input_ids[part],
            self.loss_weights[part],
            self.names[part],
            None if self.ends is None else self.ends[part],
            None if self.padding is None else self.padding[part],
        )

    @property
    def cu_seqlens(self) -> Tensor:
        """Return the ends (N + 1,) int32 of the sequences when all windows are laid end to end."""
        count, length = self.input_ids.shape
        ends = self.ends or ((length,),) * count
        flat = [0, *(row * length + end for row, own in enumerate(ends) for end in own)]
        return torch.tensor(flat, dtype=torch.int32)


class Feed(Protocol):
    """The batches of one stage on one rank, one after the other; its position is small and plain."""

    def __next__(self) -> WindowBatch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class HeldOut:
    """This rank's share of the held-out windows, and how many steps lie between two looks at them."""

    batch: WindowBatch
    every: int


@dataclass
class StepFeed:
    """Batches that are a pure function of the step; a rank takes every `ranks`-th window from the `rank`-th."""

    batch: Callable[[int], WindowBatch]
    rank: int = 0
    ranks: int = 1
    step: int = 0

    def __next__(self) -> WindowBatch:
        whole = self.batch(self.step)
        self.step += 1
        if self.ranks == 1:
            return whole
        own = slice(self.rank, None, self.ranks)
        return WindowBatch(whole.input_ids[own], whole.loss_weights[own], tuple(whole.names[own]))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]


@dataclass
class StreamFeed:
    """Packed windows of shards."""

    stream: Stream

    def __next__(self) -> WindowBatch:
        packed = next(self.stream)
        length = packed.input_ids.shape[1]
        ends, padding = [], np.zeros(packed.input_ids.shape, bool)
        for row, pieces in enumerate(packed.pieces):
            own = list(itertools.accumulate(piece.length for piece in pieces))
            padding[row, own[-1] :] = True
            ends.append(tuple(own if own[-1] == length else [*own, length]))
        return WindowBatch(
            torch.from_numpy(packed.input_ids),
            torch.from_numpy(packed.loss_weights),
            packed.names,
            tuple(ends),
            torch.from_numpy(padding) if padding.any() else None,
        )

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state)


class Data(Protocol):
    """What the stages of a run draw from."""

    def feed(self, stage: Stage, seed: int, rank: int = 0, ranks: int = 1) -> Feed:
        """Return the batches of a stage on one of `ranks` data-parallel ranks.

        Raises:
            RecipeError: the stage names data that is not there.
        """
        ...

    def describe(self) -> dict[str, str]:
        """Return what it is, by name, with hashes: for the model card."""
        ...


@dataclass(frozen=True)
class Corpus:
    """A tokenizer and one stream of text.

    With the embedded tokenizer every task of `sala.data` can be mixed; another tokenizer has no words for the generated
    tasks and trains on "text" alone.
    """

    text: NDArray[np.int64]  # (tokens,)
    words: Vocabulary | None
    begin: int | None

    def feed(self, stage: Stage, seed: int, rank: int = 0, ranks: int = 1) -> StepFeed:
        return StepFeed(self.batches(stage, seed), rank, ranks)

    def summary(self, stages: Sequence[Stage]) -> str:
        """Say what all stages draw from, for want of sources."""
        ((what, text),) = self.describe().items()
        tokens = sum(stage.tokens for stage in stages)
        return f"the recipe names no sources: its {tokens:,} tokens are the package's own {what} ({text.rpartition(', ')[0]})"

    def describe(self) -> dict[str, str]:
        generated = " and generated tasks" if self.words is not None else ""
        return {f"text{generated}": f"Python's standard library, {len(self.text):,} tokens, {self._hash}"}

    @cached_property
    def _hash(self) -> str:
        import hashlib

        return f"sha256 {hashlib.sha256(np.ascontiguousarray(self.text).tobytes()).hexdigest()}"

    def batches(self, stage: Stage, seed: int) -> Callable[[int], WindowBatch]:
        """Return step -> batch of a stage, a pure function of the seed and the step.

        Raises:
            RecipeError: a task that is unknown or that this tokenizer has no words for.
        """
        if self.words is None:
            return self._text_batches(stage, seed)
        mix = Mix(
            weights=stage.weights_at(0),
            length=stage.length,
            batch_size=stage.batch,
            seed=seed,
            vocabulary=self.words,
            text=self.text,
        )

        def batch(step: int) -> WindowBatch:
            windows = dataclasses.replace(mix, weights=stage.weights_at(step)).batch(step)
            names = tuple(f"{task} (seed {seed}, step {step})" for task in windows.tasks)
            return WindowBatch(torch.from_numpy(windows.input_ids), torch.from_numpy(windows.loss_weights), names)

        return batch

    def _text_batches(self, stage: Stage, seed: int) -> Callable[[int], WindowBatch]:
        if set(stage.data) != {"text"}:
            raise RecipeError(
                f"the data is {', '.join(stage.data)}, but this tokenizer has no words for generated "
                "tasks; expected folders of shards for them under 'sources' (--set sources.NAME.shards=FOLDER), or data: {text: 1}"
            )
        prefix = [] if self.begin is None else [self.begin]
        size = stage.length - len(prefix)
        if len(self.text) < size:
            raise InputError(f"the text has {len(self.text)} tokens; stage {stage.name!r} needs windows of {size}")

        def batch(step: int) -> WindowBatch:
            starts = np.random.default_rng((seed, step)).integers(0, len(self.text) - size + 1, stage.batch)
            rows = np.stack([np.concatenate([prefix, self.text[start : start + size]]) for start in starts])
            weights = torch.ones(rows.shape, dtype=torch.float32)
            return WindowBatch(
                torch.from_numpy(rows.astype(np.int64)), weights, tuple(f"text at token {start}" for start in starts)
            )

        return batch


@dataclass(frozen=True)
class ShardData:
    """Folders of shards by name (`sala data` makes them)."""

    sources: Mapping[str, Source]

    def feed(self, stage: Stage, seed: int, rank: int = 0, ranks: int = 1) -> StreamFeed:
        return StreamFeed(
            Stream(
                {name: self.sources[name] for name in stage.data},
                stage.data,
                length=stage.length,
                batch=stage.batch,
                steps=stage.steps,
                seed=seed,
                rank=rank,
                ranks=ranks,
            )
        )

    def summary(self, stage: Stage) -> str:
        """Say what there is for a stage: documents, tokens, and how many are longer than its windows."""
        return "\n".join(f"{stage.name}: {self.sources[name].describe(stage.length)}" for name in stage.data)

    def describe(self) -> dict[str, str]:
        return {
            name: f"{source.shards.num_documents:,} documents, {source.shards.num_tokens:,} tokens, "
            f"sha256 {source.shards.sha256}"
            for name, source in self.sources.items()
        }


def read_corpus(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document] | None = None) -> Corpus:
    """Encode `documents` (the standard library's training split when None), each ended by the end token."""
    documents = library_documents("train") if documents is None else documents
    empty = blank_corpus(tokenizer, 0)
    if empty.words is not None:
        return dataclasses.replace(empty, text=encode_documents(tokenizer, documents))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return dataclasses.replace(empty, text=encode_stream(tokenizer, documents, end))


def read_held_out(recipe: Recipe, data: Data, tokenizer: PreTrainedTokenizerBase) -> Data | None:
    """Return what a recipe's validation draws from: `data`, or the package's held-out text; None without validation."""
    if recipe.validation is None or recipe.sources:
        return None if recipe.validation is None else data
    return read_corpus(tokenizer, library_documents("valid"))


def blank_corpus(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Corpus:
    """Return a corpus of this tokenizer without text, which can say what its stages would draw."""
    try:
        words = vocabulary(tokenizer)
    except InputError:
        words = None
    return Corpus(np.zeros(tokens, np.int64), words, tokenizer.bos_token_id if words is None else words.begin)


def read_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> Data:
    """Open what a recipe's stages draw from: its sources, or the package's own text and tasks.

    tokenizer: None compares sources with none.

    Raises:
        InputError: a folder that holds no shards.
        TokenizerError: shards of another tokenizer.
    """
    if not recipe.sources:
        assert tokenizer is not None
        return read_corpus(tokenizer)
    return ShardData(
        {name: Source(Shards(row.shards, tokenizer), row.length_weights) for name, row in recipe.sources.items()}
    )
