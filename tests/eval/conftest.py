"""The embedded tokenizer's words, and models that answer without a network."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from sala.data import Vocabulary, load_tokenizer, vocabulary
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM
from sala.model.interface import CACHE

SPARSE = {
    "kernel_size": 4,
    "kernel_stride": 2,
    "init_blocks": 1,
    "block_size": 8,
    "window_size": 16,
    "topk": 2,
    "dense_len": 32,
}


class Scripted(nn.Module):
    """A model whose prediction after each token is what `predict` says of all tokens so far, (B, S) -> (B, S)."""

    def __init__(self, predict: Callable[[Tensor], Tensor], vocab_size: int) -> None:
        super().__init__()
        self.predict, self.vocab_size = predict, vocab_size
        self.config = MiniCPMSALAConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=vocab_size
        )
        self.generation_config = GenerationConfig()
        # in float64 nothing is recorded in C++
        self.device, self.dtype = torch.device("cpu"), torch.float64
        self.calls: list[int] = []
        self.seen = torch.zeros(1, 0, dtype=torch.int64)

    def forward(self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: Any = 0, **named: Any) -> Any:
        # by the installed transformers' name for it
        cache = named.get(CACHE)
        if cache is not None:
            fresh = torch.zeros(len(input_ids), 0, dtype=torch.int64)
            self.seen = self.seen[:, : cache.columns] if cache.columns else fresh
        self.seen = torch.cat([self.seen, input_ids], dim=1) if use_cache else input_ids
        if cache is not None:
            cache.columns += input_ids.shape[1]
        self.calls.append(input_ids.shape[1])
        predicted_BT = self.predict(self.seen)[:, -input_ids.shape[1] :]
        kept = slice(None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SimpleNamespace(logits=nn.functional.one_hot(predicted_BT[:, kept], self.vocab_size).float())


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer(Path(str(resources.files("sala"))) / "embedded" / "teacher")


@pytest.fixture(scope="session")
def words(tokenizer: Any) -> Vocabulary:
    return vocabulary(tokenizer)


@pytest.fixture
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 600)


@pytest.fixture
def scripted(tokenizer: Any) -> Callable[[Callable[[Tensor], Tensor]], Scripted]:
    return lambda predict: Scripted(predict, len(tokenizer))


@pytest.fixture
def tiny_hybrid(tokenizer: Any) -> MiniCPMSALAForCausalLM:
    """A sparse, a linear and a full layer with random weights."""
    config = MiniCPMSALAConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        lightning_nkv=2,
        mixer_types=["minicpm4", "lightning-attn", "attention"],
        sparse_config=SPARSE,
        initializer_range=0.3,
    )
    return MiniCPMSALAForCausalLM(config).eval()
