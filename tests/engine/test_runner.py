"""A sequence restored from kept keys and states goes on as if it had read everything itself."""

import pytest
import torch

from model.shapes import TINY_SPARSE, tiny_model, tokens
from sala.engine.runner import Extension, Runner
from tolerances import assert_close


@pytest.fixture(scope="module")
def runner():
    return Runner(tiny_model())


def read(runner, sequence, ids):
    return runner.extend([Extension(sequence, ids)])[0].logits_NX


@pytest.mark.parametrize("split", [64, 128, 192])
@pytest.mark.parametrize("more", [1, 2, 63, 64, 65])
def test_a_restored_sequence_goes_on_as_the_one_it_was_kept_from(runner, split, more):
    ids = tokens(1, split + more)[0].tolist()
    whole = runner.open()
    read(runner, whole, ids[:64])
    first = runner.keys(whole, 0, 64)
    if split > 64:
        read(runner, whole, ids[64:split])
    parts = [first, runner.keys(whole, 64, split)] if split > 64 else [first]
    states = runner.states(whole)
    expected = read(runner, whole, ids[split:])
    # what was kept does not change with the sequence, nor when that is freed
    runner.free(whole)
    restored = runner.restore(ids[:split], parts, states)
    assert torch.equal(read(runner, restored, ids[split:]), expected)
    assert restored.length == split + more


def test_two_sequences_from_one_prefix_do_not_see_each_other(runner):
    ids = tokens(1, 128)[0].tolist()
    source = runner.open()
    read(runner, source, ids[:64])
    keys, states = runner.keys(source, 0, 64), runner.states(source)
    left, right = (runner.restore(ids[:64], [keys], states) for _ in range(2))
    expected = read(runner, right, ids[64:])
    read(runner, left, ids[70:])
    again = runner.restore(ids[:64], [keys], states)
    assert torch.equal(read(runner, again, ids[64:]), expected)


def test_rows_of_any_lengths_are_read_together_as_each_alone(runner):
    lengths = [1, 5, 64, 130]
    rows = [tokens(1, length, seed=length)[0].tolist() for length in lengths]
    together = runner.extend([Extension(runner.open(), row) for row in rows])
    for row, result in zip(rows, together, strict=True):
        assert_close(result.logits_NX, read(runner, runner.open(), row))


def test_all_logits_are_those_of_the_model(runner):
    ids = tokens(1, 30)[0].tolist()
    result = runner.extend([Extension(runner.open(), ids, every=True)])[0]
    assert_close(result.logits_NX, runner.model(torch.tensor([ids])).logits[0])


def test_kept_bytes_are_those_of_the_plan(runner):
    sequence = runner.open()
    read(runner, sequence, tokens(1, 192)[0].tolist())
    keys, states = runner.keys(sequence, 64, 192), runner.states(sequence)
    assert states.size_bytes == runner.state_bytes
    assert abs(keys.size_bytes - 128 * runner.token_bytes) <= 0.1 * keys.size_bytes


def test_watched_blocks_have_the_attention_that_the_layer_gives_them():
    # everything is read: the weights are those of the whole softmax
    sparse = {**TINY_SPARSE, "topk": 7, "dense_len": 0}
    runner = Runner(
        tiny_model(mixer_types=["minicpm4", "lightning-attn", "lightning-attn", "lightning-attn"], sparse_config=sparse)
    )
    ids = tokens(1, 150)[0].tolist()
    sequence = runner.open()
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


def test_nothing_is_left_unread_where_the_text_is_short(runner):
    assert runner.extend([Extension(runner.open(), [5, 6, 7], watched=True)])[0].blocks_N is None
