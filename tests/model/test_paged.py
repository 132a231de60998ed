"""Rows in pages are rows: of any lengths together, with shared beginnings, saved states and calls that fail."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from devices import GPU
from model.shapes import TINY_SPARSE, tiny_model, tokens
from sala.errors import InputError
from sala.model import MiniCPMSALAForCausalLM, PagedCache, PagedRow, new_cache, new_paged_cache
from sala.ops.infllm import num_windows

# four blocks of 16 are read, one of them freely chosen
CHOOSING = {**TINY_SPARSE, "window_size": 16, "topk": 3}
KINDS = {
    "hybrid": {"sparse_config": CHOOSING},
    "attention": {"mixer_types": ["attention"] * 4, "attn_use_rope": True, "attention_qk_norm": True},
    "exact": {"mixer_types": ["minicpm4"] * 4, "sparse_config": {**CHOOSING, "normalizer": "exact"}},
    "grouped": {"attn_logits_scaling": 20, "lightning_nkv": 2, "sparse_config": CHOOSING},
}
PAGE = 32
every_kind = pytest.mark.parametrize("kind", KINDS)


class Requests:
    """Sequences in the pages of one cache, which are handed out in a scattered order."""

    def __init__(self, model: MiniCPMSALAForCausalLM, pages: int = 60, page_tokens: int = PAGE):
        self.model, self.cache = model, new_paged_cache(model.config, pages, 16, page_tokens)
        self.free_pages = np.random.default_rng(0).permutation(pages).astype(np.int32)
        self.free_slots = list(range(16))
        self.rows: list[PagedRow] = []

    def open(self, pages: int, shared: Sequence[int] = (), length: int = 0, slot: int = -1) -> int:
        own, self.free_pages = self.free_pages[:pages], self.free_pages[pages:]
        self.rows.append(
            PagedRow(np.concatenate([np.array(shared, np.int32), own]), length, (slot, self.free_slots.pop()))
        )
        return len(self.rows) - 1

    @torch.inference_mode()
    def read(self, ids: dict[int, Tensor]) -> list[Tensor]:
        """Return the logits of the tokens that each row reads."""
        rows = [self.rows[row] for row in ids]
        new = [len(x) for x in ids.values()]
        padded = torch.nn.utils.rnn.pad_sequence(list(ids.values()), batch_first=True)
        network = self.model.model
        hidden = network.run(padded, network.rotated(self.cache.place(rows, new)), self.cache.layers)
        for index, row, count in zip(ids, rows, new, strict=True):
            read, written = row.slots
            spare = self.free_slots.pop() if read < 0 else read
            self.rows[index] = PagedRow(row.pages, row.length + count, (written, spare))
        return [self.model.logits(h[None, :count])[0] for h, count in zip(hidden, new, strict=True)]


def alone(model: MiniCPMSALAForCausalLM, parts: Sequence[Tensor]) -> list[Tensor]:
    cache = new_cache(model.config)
    with torch.inference_mode():
        return [model(part[None], cache=cache).logits[0] for part in parts]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


@every_kind
def test_rows_of_any_lengths_read_together_as_each_alone(kind: str) -> None:
    model = tiny_model(**KINDS[kind])
    lengths = (150, 33, 1, 96)
    texts = [tokens(1, length + 40, seed=length)[0] for length in lengths]
    requests = Requests(model)
    for _ in texts:
        requests.open(6)
    first = requests.read({row: text[:length] for row, (text, length) in enumerate(zip(texts, lengths, strict=True))})
    # decoding in changing company
    steps: list[list[Tensor]] = [[] for _ in texts]
    for step in range(40):
        company = [row for row in range(len(texts)) if row != step % 5]
        for row in company:
            at = requests.rows[row].length
            steps[row].append(texts[row][at : at + 1])
        outs = requests.read({row: steps[row][-1] for row in company})
        for row, out in zip(company, outs, strict=True):
            steps[row][-1] = out
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        expected = alone(model, [text[:length], *text[length : length + len(steps[row])].split(1)])
        close(first[row], expected[0])
        close(torch.cat(steps[row]), torch.cat(expected[1:]))


@every_kind
@pytest.mark.parametrize("shared_pages", [1, 3])
def test_a_prefix_is_shared_by_its_pages_and_a_saved_state(kind: str, shared_pages: int) -> None:
    model = tiny_model(**KINDS[kind])
    text, shared = tokens(1, 150)[0], shared_pages * PAGE
    requests = Requests(model)
    first = requests.open(6)
    requests.read({first: text[:shared]})
    saved = requests.free_slots.pop()
    requests.cache.fill_slot(saved, requests.cache.slot(requests.rows[first].slots[0]))
    pages = requests.rows[first].pages[:shared_pages]
    # the first goes on, in pages of its own
    requests.read({first: text[shared:]})
    followers = []
    for _ in range(3):
        spare = requests.free_slots.pop()
        requests.cache.fill_slot(spare, requests.cache.slot(saved))
        followers.append(requests.open(3, pages, shared, spare))
    suffixes = [tokens(1, 60, seed=100 + n)[0] for n in range(3)]
    outs = requests.read(dict(zip(followers, suffixes, strict=True)))
    for out, suffix in zip(outs, suffixes, strict=True):
        close(out, alone(model, [torch.cat([text[:shared], suffix])])[0][shared:])
    # and what was shared is as it was
    close(requests.read({first: tokens(1, 5)[0]})[0], alone(model, [torch.cat([text, tokens(1, 5)[0]])])[0][150:])


@every_kind
def test_a_call_that_fails_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(**KINDS[kind])
    text = tokens(1, 140)[0]
    expected = alone(model, [text])[0]
    for layer in range(4):
        requests = Requests(model)
        row = requests.open(6)
        requests.read({row: text[:70]})
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[layer].mlp, "forward", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                # other tokens than those that will be read
                requests.read({row: text[:70]})
        close(requests.read({row: text[70:]})[0], expected[70:])


def _interrupt(x: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_pages_of_256_tokens_give_the_tokens_of_one_piece_bit_for_bit() -> None:
    model = tiny_model(sparse_config=CHOOSING)
    text = tokens(1, 700)[0]
    requests = Requests(model, page_tokens=256)
    row, other = requests.open(3), requests.open(3)
    chunks = [*text[:600].split(200), *text[600:].split(1)]
    expected = alone(model, chunks)
    for step, (part, right) in enumerate(zip(chunks, expected, strict=True)):
        assert torch.equal(requests.read({row: part})[0], right)
        # in between another row works in the same pools
        if step % 3 == 0:
            requests.read({other: tokens(1, 7, seed=step)[0]})


def test_a_full_page_holds_its_own_windows() -> None:
    model = tiny_model(num_hidden_layers=1, mixer_types=["minicpm4"])
    requests = Requests(model)
    row = requests.open(4)
    requests.read({row: tokens(1, 100)[0]})
    for (_, tensor), (size, stride) in zip(list(requests.cache.tensors())[2:], requests.cache.tiers, strict=True):
        assert tensor.buffer is not None
        ended = [num_windows((p + 1) * PAGE, size, stride) - num_windows(p * PAGE, size, stride) for p in range(3)]
        held = tensor.buffer[torch.from_numpy(requests.rows[row].pages[:3]).long()].abs().sum((2, 3)) > 0
        assert held.sum(1).tolist() == ended


def test_a_decoding_step_copies_no_keys() -> None:
    """Neither rows nor pages: memory asked for by a step does not grow with the context."""
    model = tiny_model(sparse_config=CHOOSING)
    asked = []
    for length in (100, 800):
        requests = Requests(model)
        row = requests.open(26)
        requests.read({row: tokens(1, length)[0]})
        with torch.profiler.profile(profile_memory=True) as profile:
            requests.read({row: tokens(1, 1)[0]})
        asked.append(sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()))
    assert asked[1] < 1.2 * asked[0]


@pytest.mark.skipif(GPU, reason="interprets the kernels")
def test_rows_read_together_through_the_kernels_for_gpus(chosen_on: Callable[..., None]) -> None:
    sparse = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 0, "topk": 3, "dense_len": 1}
    model = tiny_model(num_hidden_layers=2, mixer_types=["minicpm4", "lightning-attn"], sparse_config=sparse)
    texts = [tokens(1, length, seed=length)[0] for length in (41, 20)]
    expected = [alone(model, [text])[0] for text in texts]
    chosen_on("cpu", "lightning", "infllm")
    requests = Requests(model, page_tokens=8)
    rows = [requests.open(6) for _ in texts]
    requests.read({row: text[:-2] for row, text in zip(rows, texts, strict=True)})
    for step in (-2, -1):
        outs = requests.read({row: text[step:][:1] for row, text in zip(rows, texts, strict=True)})
        for out, right in zip(outs, expected, strict=True):
            close(out[0], right[step])


PAGES = np.arange(4, dtype=np.int32)


@pytest.mark.parametrize(
    ("rows", "new", "message"),
    [
        ([PagedRow(PAGES, 100, (0, 1))], [29], "row 0 has 4 pages for 129 tokens; expected 5 of 32 tokens"),
        ([PagedRow(PAGES + 8, 0, (-1, 1))], [128], r"pages \[8, 9, 10, 11\]; expected numbers below 10"),
        ([PagedRow(PAGES, 9, (0, 4))], [1], "expected numbers below 4"),
        ([PagedRow(PAGES, 9, (0, 0))], [1], "each written once and none of them read"),
        ([PagedRow(PAGES, 9, (0, 1)), PagedRow(PAGES, 9, (2, 1))], [1, 1], "each written once"),
        ([PagedRow(PAGES, 9, (0, 1))], [0], r"read \[0\] new tokens; expected at least one row"),
        ([], [], "expected at least one row"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: list[PagedRow], new: list[int], message: str) -> None:
    cache: PagedCache = new_paged_cache(tiny_model().config, 10, 4, PAGE)
    with pytest.raises(InputError, match=message):
        cache.place(rows, new)


def test_pages_that_hold_no_whole_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="pages of 24 tokens; expected a multiple of 16"):
        new_paged_cache(tiny_model(sparse_config=CHOOSING).config, 10, 4, 24)
