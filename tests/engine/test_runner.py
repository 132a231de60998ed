"""A sequence restored from kept keys and states goes on as if it had read everything itself."""

import os
import random
from pathlib import Path

import pytest
import torch

from model.shapes import TINY_SPARSE, tiny_model, tokens
from sala.engine.runner import Extension, Runner
from tolerances import assert_close

PAGE = 64


@pytest.fixture(scope="module")
def runner():
    return Runner(tiny_model(), 2**23, max_running=8)


@pytest.fixture(autouse=True)
def no_slot_is_lost(request):
    yield
    if "runner" in request.fixturenames:
        runner = request.getfixturevalue("runner")
        assert sorted(runner._slots) == list(range(16))


@pytest.fixture
def opened(runner):
    """Return what opens a sequence on pages of its own, scattered, which is freed after the test."""
    sequences, free = [], list(range(runner.num_pages))
    random.Random(0).shuffle(free)

    def start(tokens, shared=(), states=None):
        pages = [*shared, *(free.pop() for _ in range(-(-tokens // PAGE) - len(shared)))]
        sequences.append(runner.open(pages) if states is None else runner.restore(pages, states))
        return sequences[-1]

    yield start
    for sequence in sequences:
        runner.free(sequence)


def read(runner, sequence, ids):
    return runner.extend([Extension(sequence, ids)])[0].logits_NX


@pytest.mark.parametrize("split", [64, 128, 192])
@pytest.mark.parametrize("more", [1, 2, 63, 64, 65])
def test_a_restored_sequence_goes_on_as_the_one_it_was_kept_from(runner, opened, split, more):
    ids = tokens(1, split + more)[0].tolist()
    whole = opened(split + more)
    read(runner, whole, ids[:split])
    states = runner.states(whole)
    expected = read(runner, whole, ids[split:])
    restored = opened(split + more, whole.pages[: split // PAGE], states)
    assert torch.equal(read(runner, restored, ids[split:]), expected)
    assert restored.length == split + more


def test_two_sequences_from_one_prefix_do_not_see_each_other(runner, opened):
    ids = tokens(1, 128)[0].tolist()
    source = opened(64)
    read(runner, source, ids[:64])
    states = runner.states(source)
    left, right = (opened(128, source.pages, states) for _ in range(2))
    expected = read(runner, right, ids[64:])
    read(runner, left, ids[70:])
    again = opened(128, source.pages, states)
    assert torch.equal(read(runner, again, ids[64:]), expected)


def test_rows_of_any_lengths_are_read_together_as_each_alone(runner, opened):
    lengths = [1, 5, 64, 130]
    rows = [tokens(1, length + 3, seed=length)[0].tolist() for length in lengths]
    sequences = [opened(length + 3) for length in lengths]
    found = [runner.extend([Extension(s, row[:n]) for s, row, n in zip(sequences, rows, lengths, strict=True)])]
    for step in range(3):
        steps = zip(sequences, rows, lengths, strict=True)
        found.append(runner.extend([Extension(s, row[n + step : n + step + 1]) for s, row, n in steps]))
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        with torch.inference_mode():
            expected = runner.model(torch.tensor([row])).logits[0]
        logits = torch.cat([results[index].logits_NX for results in found])
        torch.testing.assert_close(logits, expected[length - 1 :], atol=2e-4, rtol=1e-4)


def test_all_logits_are_those_of_the_model(runner, opened):
    ids = tokens(1, 30)[0].tolist()
    result = runner.extend([Extension(opened(30), ids, every=True)])[0]
    assert_close(result.logits_NX, runner.model(torch.tensor([ids])).logits[0])


def test_pages_and_states_take_what_the_plan_says(runner, opened):
    sequence = opened(192)
    read(runner, sequence, tokens(1, 192)[0].tolist())
    assert runner.states(sequence).size_bytes == runner.state_bytes
    pages = sum(t.buffer.numel() * t.buffer.element_size() for _, t in runner.cache.tensors())
    assert pages == runner.num_pages * runner.page_bytes <= runner.budget_bytes


def test_memory_that_no_sequence_needs_is_not_taken():
    runner = Runner(tiny_model(), 2**32)
    statm = Path("/proc/self/statm")
    before = int(statm.read_text().split()[1])
    runner.extend([Extension(runner.open([0]), [5, 6, 7])])
    assert sum(t.buffer.numel() for _, t in runner.cache.tensors()) * 4 > 2**31
    assert (int(statm.read_text().split()[1]) - before) * os.sysconf("SC_PAGE_SIZE") < 2**28


def test_watched_blocks_have_the_attention_that_the_layer_gives_them():
    # everything is read: the weights are those of the whole softmax
    sparse = {**TINY_SPARSE, "topk": 7, "dense_len": 0}
    runner = Runner(
        tiny_model(
            mixer_types=["minicpm4", "lightning-attn", "lightning-attn", "lightning-attn"], sparse_config=sparse
        ),
        2**22,
    )
    ids = tokens(1, 150)[0].tolist()
    sequence = runner.open(list(range(3)))
    result = runner.extend([Extension(sequence, ids, watched=True)])[0]
    layer, geometry = runner.model.model.layers[0], runner.config.sparse_geometry
    with torch.inference_mode():
        hidden = runner.model.model.embed_tokens(torch.tensor([ids])) * runner.config.scale_emb
        q, k, _ = layer.self_attn.project(layer.input_layernorm(hidden))
    scores = torch.einsum("grk,sgk->grs", q[0, -1].unflatten(0, (2, 2)), k[0]) * layer.self_attn.width**-0.5
    blocks = torch.zeros(10).index_add_(0, torch.arange(150) // 16, scores.softmax(-1).sum((0, 1)))
    blocks[: geometry.init_blocks] = 0
    blocks[9 - geometry.local_blocks :] = 0
    # a block is left out by each group
    assert result.blocks_N is not None
    close = (result.blocks_N - blocks).abs() < 0.25 * blocks + 1e-6
    assert close.sum() >= 7 and (result.blocks_N >= 0).all()


def test_nothing_is_left_unread_where_the_text_is_short(runner, opened):
    assert runner.extend([Extension(opened(3), [5, 6, 7], watched=True)])[0].blocks_N is None
