"""Batches of a stage as tensors, for the embedded tokenizer and for any other."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sala.data import Document, Mix, Vocabulary, encode_documents, library_documents, vocabulary
from sala.errors import InputError, RecipeError
from sala.train.recipe import Stage


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """Token ids int64 (B, T), the weight of each as a target (B, T), and what each window holds."""

    input_ids: Tensor
    loss_weights: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """A tokenizer and one stream of text: what the stages of a run draw from.

    With the embedded tokenizer every task of `sala.data` can be mixed; another tokenizer has no words for the generated
    tasks and trains on "text" alone.
    """

    text: NDArray[np.int64]  # (tokens,)
    words: Vocabulary | None
    begin: int | None

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
                f"stage {stage.name!r} mixes {', '.join(stage.data)}, but this tokenizer has no words for generated "
                "tasks, and this version reads no files of data; use data: {text: 1}, or --dry-run, which plans the stage"
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


def read_corpus(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document] | None = None) -> Corpus:
    """Encode `documents` (the standard library's training split when None), each ended by the end token."""
    documents = library_documents("train") if documents is None else documents
    try:
        words = vocabulary(tokenizer)
    except InputError:
        words = None
    if words is not None:
        return Corpus(encode_documents(tokenizer, documents), words, words.begin)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    return Corpus(np.concatenate([np.asarray([*row, *end], np.int64) for row in encoded]), None, tokenizer.bos_token_id)
