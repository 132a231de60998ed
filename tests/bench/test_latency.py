"""Time and memory against length, and where they were measured."""

import shutil
from typing import Any

import pytest
import torch

from sala.bench import environment, latency, peak_memory
from sala.bench.environment import commit
from sala.errors import InputError
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM

MIB = 2**20


def tiny(*mixer_types: str) -> Any:
    config = MiniCPMSALAConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=len(mixer_types),
        num_attention_heads=2,
        head_dim=8,
        mixer_types=list(mixer_types),
    )
    return MiniCPMSALAForCausalLM(config).eval()


def test_every_model_is_measured_at_every_length_and_caches_grow_as_they_should() -> None:
    models = {"softmax": tiny("attention"), "linear": tiny("lightning-attn")}
    runs: list[int] = []
    points = latency(
        models, torch.arange(130) % 50, {63: 2, 130: 1}, on_run=lambda done, total: runs.append(total - done)
    )
    assert [(p.length, p.model, p.repeats) for p in points] == [
        (63, "softmax", 2),
        (63, "linear", 2),
        (130, "softmax", 1),
        (130, "linear", 1),
    ]
    assert runs == list(range(5, -1, -1))
    # keys and values of two heads of width 8 in float32, against one state of 8 x 8 a head
    assert [p.cache_bytes for p in points] == [63 * 2 * 2 * 8 * 4, 2 * 8 * 8 * 4, 130 * 2 * 2 * 8 * 4, 2 * 8 * 8 * 4]
    assert all(0 < min(p.first_token_each_s) <= p.first_token_s <= max(p.first_token_each_s) for p in points)


@pytest.mark.parametrize("repeats", [{131: 1}, {}, {10: 0}])
def test_what_cannot_be_measured_is_refused(repeats: dict[int, int]) -> None:
    with pytest.raises(InputError, match="at least one"):
        latency({"model": tiny("attention")}, torch.zeros(130, dtype=torch.int64), repeats)


def test_peak_memory_sees_what_was_freed_again() -> None:
    with peak_memory() as memory:
        block = bytearray(64 * MIB)
        del block
    if memory.added_bytes is None:
        pytest.skip("this system does not tell a process's peak")
    assert 60 * MIB <= memory.added_bytes < 200 * MIB


def test_memory_that_was_freed_before_counts_again() -> None:
    # pieces below one that is still in use: the C library keeps them when they are freed
    pieces = [bytearray(64 * 1024) for _ in range(512)]
    in_use = bytearray(64 * 1024)
    del pieces
    with peak_memory() as memory:
        pieces = [bytearray(64 * 1024) for _ in range(512)]
        del pieces
    if memory.added_bytes is None:
        pytest.skip("this system does not tell a process's peak")
    assert memory.added_bytes >= 28 * MIB
    del in_use


def test_a_commit_that_is_empty_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for named, found in (("", None), ("abc", "abc")):
        monkeypatch.setenv("SALA_COMMIT", named)
        assert commit() == found


def test_the_environment_says_where_and_with_what() -> None:
    told = environment()
    assert told["versions"]["torch"] == torch.__version__
    assert told["hardware"]["cores"] >= 1
    assert not any(part.startswith("/") for part in told["command"].split()[:1])
