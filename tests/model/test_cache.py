"""One call, chunks of any size and token by token agree; so do padded rows, packed rows and single ones."""

import pytest
import torch

from model.shapes import TINY_SPARSE, tiny_config, tiny_model, tokens
from sala.errors import InputError
from sala.model import Rows, new_cache
from sala.model import cache as cache_module
from sala.ops.infllm import compress, num_windows

# four blocks of 16 are read, one of them freely chosen: compressed keys matter
CHOOSING = {**TINY_SPARSE, "window_size": 16, "topk": 3}
KINDS = {
    "hybrid": {"sparse_config": CHOOSING},
    "attention": {"mixer_types": ["attention"] * 4, "attn_use_rope": True, "attention_qk_norm": True},
    "sparse": {"mixer_types": ["minicpm4"] * 4, "sparse_config": {**CHOOSING, "normalizer": "exact"}},
    "lightning": {"mixer_types": ["lightning-attn"] * 4, "lightning_nkv": 2},
    "scaled-logits": {"attn_logits_scaling": 20},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [(1,) * 150, (64, 86), (7, 1, 100, 42), (149, 1)])
def test_chunks_of_any_size_are_one_call(kind, chunks):
    model, ids = tiny_model(**KINDS[kind]), tokens(2, 150)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = new_cache(model.config)
        parts = [model(part, cache=cache).logits for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-4, rtol=1e-4)
    assert cache.get_seq_length() == 150


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("static", [False, True])
def test_padding_changes_nothing(kind, side, use_cache, static, monkeypatch):
    if static:
        # as where positions are on a GPU
        monkeypatch.setattr(Rows, "static", True)
    model, ids = tiny_model(**KINDS[kind]), tokens(3, 120)
    lengths = (120, 33, 71)
    padded, mask = torch.zeros_like(ids), torch.zeros(3, 120, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(120 - length, None) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = ids[row, :length], 1
    with torch.no_grad():
        together = model(padded, attention_mask=mask, use_cache=use_cache).logits
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(together[row, mask[row].bool()], alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["hybrid", "attention"])
def test_padding_changes_no_gradient(kind):
    model, ids = tiny_model(**KINDS[kind]).train(), tokens(2, 90)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :70], labels[1, :71] = 0, -100

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    def loss(ids, labels, **options):
        return torch.nn.functional.cross_entropy(
            model(ids, **options).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )

    alone = loss(ids[:1], labels[:1]) + loss(ids[1:, 70:], labels[1:, 70:])
    for actual, expected in zip(gradients(loss(ids, labels, attention_mask=mask)), gradients(alone), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_goes_on_token_by_token(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens(2, 100)
    lengths = (90, 41)
    with torch.no_grad():
        padded = torch.zeros(2, 90, dtype=torch.long)
        mask = torch.zeros(2, 100, dtype=torch.long)
        for row, length in enumerate(lengths):
            padded[row, 90 - length :], mask[row, 90 - length :] = ids[row, :length], 1
        cache = new_cache(model.config)
        model(padded, attention_mask=mask[:, :90], cache=cache)
        steps = []
        for step in range(10):
            new = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])[:, None]
            steps.append(model(new, attention_mask=mask[:, : 91 + step], cache=cache).logits)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, : length + 10]).logits[0, length:]
            torch.testing.assert_close(torch.cat(steps, dim=1)[row], alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_are_separate_ones(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens(1, 130)
    ends = torch.tensor([0, 1, 64, 130])
    with torch.no_grad():
        packed = model(ids, cu_seqlens=ends, use_cache=False).logits
        parts = [model(part, use_cache=False).logits for part in ids.split(ends.diff().tolist(), dim=1)]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1), atol=2e-4, rtol=1e-4)


def test_compressed_keys_appear_when_their_window_completes():
    assert [t for t in range(300) if num_windows(t + 1, 32, 16) > num_windows(t, 32, 16)][:3] == [31, 47, 63]
    assert [t for t in range(300) if num_windows(t + 1, 128, 64) > num_windows(t, 128, 64)][:3] == [127, 191, 255]
    model, ids = tiny_model(), tokens(1, 90)
    with torch.no_grad():
        one, many = new_cache(model.config), new_cache(model.config)
        model(ids, cache=one)
        for part in ids.split(1, dim=1):
            model(part, cache=many)
    for left, right in zip(one.layers[0].tiers, many.layers[0].tiers, strict=True):
        assert left.length == right.length > 0
        torch.testing.assert_close(left.filled, right.filled, atol=1e-5, rtol=1e-5)


def test_each_row_computes_a_window_once_when_it_completes(monkeypatch):
    computed = []
    monkeypatch.setattr(
        cache_module, "compress", lambda k, *sizes: computed.append(compress(k, *sizes)) or computed[-1]
    )
    model = tiny_model(num_hidden_layers=1, mixer_types=["minicpm4"])
    lengths, steps = (90, 30), 20
    mask = torch.zeros(2, 90 + steps, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 90 - length :] = 1
    cache = new_cache(model.config)
    with torch.no_grad():
        model(tokens(2, 90), attention_mask=mask[:, :90], cache=cache)
        for step in range(steps):
            model(tokens(2, 1, seed=step), attention_mask=mask[:, : 91 + step], cache=cache)
    complete = [num_windows(length + steps, *tier) for length in lengths for tier in cache.tiers]
    assert sum(k.shape[0] * k.shape[1] for k in computed) == sum(complete)


def test_memory_taken_ahead_changes_nothing():
    model, ids = tiny_model(), tokens(1, 90)
    with torch.no_grad():
        cache = new_cache(model.config, reserve=200)
        reserved = torch.cat([model(part, cache=cache).logits for part in ids.split(30, dim=1)], dim=1)
        torch.testing.assert_close(reserved, model(ids).logits, atol=2e-4, rtol=1e-4)


def test_size_counts_keys_values_tiers_and_states():
    model = tiny_model()
    cache = new_cache(model.config)
    with torch.no_grad():
        model(tokens(1, 100), cache=cache)
    kv = 100 * 2 * 2 * 16 * 4
    tiers = (num_windows(100, 8, 4) + num_windows(100, 32, 16)) * 2 * 16 * 4
    assert cache.size_bytes == 2 * kv + tiers + 2 * 4 * 16 * 16 * 4


def test_rows_of_a_cache_can_be_chosen_and_repeated():
    model, ids = tiny_model(), tokens(2, 70)
    with torch.no_grad():
        cache = new_cache(model.config)
        model(ids, cache=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3]))
        after = model(ids[:1, :5], cache=cache).logits
        expected = model(torch.cat([ids[1:], ids[:1, :5]], dim=1)).logits[:, -5:]
    torch.testing.assert_close(after, expected, atol=2e-4, rtol=1e-4)


def test_a_cache_cannot_be_cut_back():
    with pytest.raises(InputError, match="cut back"):
        new_cache(tiny_config()).crop(-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(tokens(1, 9), attention_mask=torch.ones(1, 8)), r"expected \(1, 9\)"),
        (
            lambda m: m(tokens(1, 9), position_ids=torch.arange(1, 10)[None]),
            "position_ids are 1 at token 0 of row 0; expected 0",
        ),
        (lambda m: m(tokens(2, 9), cu_seqlens=torch.tensor([0, 9])), "packed into one row"),
        (lambda m: m(tokens(1, 9), cu_seqlens=torch.tensor([0, 8])), "increasing from 0"),
        (lambda m: m(), "either input_ids or inputs_embeds"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(tiny_model())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_rewound_cache_has_forgotten(kind, batch):
    model, ids = tiny_model(**KINDS[kind]), tokens(batch, 140)
    body, first, second = ids[:, :90], ids[:, 90:120], ids[:, 120:]
    # the second row of two is shorter: its windows of keys are complete at other places
    mask = torch.ones(batch, 90, dtype=torch.long)
    mask[1:, :37] = 0

    def going_on(cache, part):
        longer = torch.cat([mask, torch.ones_like(part)], dim=1)
        return model(part, attention_mask=longer, cache=cache).logits

    with torch.no_grad():
        cache = new_cache(model.config)
        model(body, attention_mask=mask, cache=cache)
        mark, size = cache.mark(), cache.size_bytes
        wanted = going_on(cache, first)
        for part in (second, first):
            cache.rewind(mark)
            assert (cache.get_seq_length(), cache.size_bytes) == (90, size)
            after = going_on(cache, part)
    torch.testing.assert_close(after, wanted, atol=0, rtol=0)
