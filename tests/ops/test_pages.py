"""Laws of keys and values in pages: every backend reads them as it reads the rows they are made of."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from devices import on_device_of, row
from sala.errors import InputError
from sala.ops.dense import dense_attention
from sala.ops.dispatch import BACKENDS, unavailable
from sala.ops.infllm import SparseGeometry, compress, infllm_attention, num_windows
from tolerances import assert_close

K, V = 8, 6
SCALE = K**-0.5
# six blocks of 16 tokens are read, two of them freely chosen
SMALL = SparseGeometry(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4, dense_len=0)
GARBAGE = torch.tensor([-1, 2**31 - 1, -(2**31), 10**6], dtype=torch.int32)

every_backend = pytest.mark.parametrize(
    "backend", [row(name) for name in BACKENDS["infllm"] if name == "triton" or unavailable("infllm", name) is None]
)


def qkv(T: int, S: int, B: int = 2, G: int = 1, group: int = 2) -> list[Tensor]:
    shapes = (B, T, G * group, K), (B, S, G, K), (B, S, G, V)
    q, k, v = (torch.randn(shape) for shape in shapes)
    return [2 * q, k, v]


def paged(k: Tensor, v: Tensor, page_size: int, ends: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of the lengths `ends` in pages anywhere in a pool: all else there is NaN, unused entries are no pages."""
    B, S = k.shape[:2]
    places = -(-S // page_size) + 2
    pool = torch.randperm(B * places + 3).int()
    table = GARBAGE[torch.arange(B * places) % len(GARBAGE)].view(B, places)
    pages = [torch.full((len(pool), page_size, *x.shape[2:]), torch.nan) for x in (k, v)]
    for b, end in enumerate(ends):
        for place in range(-(-end // page_size)):
            table[b, place] = page = pool[b * places + place]
            tokens = slice(place * page_size, min((place + 1) * page_size, end))
            for x_pages, x in zip(pages, (k, v), strict=True):
                x_pages[page, : tokens.stop - tokens.start] = x[b, tokens]
    return *pages, table


def tiers(k: Tensor, geometry: SparseGeometry) -> tuple[Tensor, Tensor]:
    return (
        compress(k, geometry.kernel_size, geometry.kernel_stride),
        compress(k, geometry.coarse_size, geometry.coarse_stride),
    )


def paged_tiers(
    k: Tensor, table: Tensor, num_pages: int, page_size: int, ends: list[int], geometry: SparseGeometry = SMALL
) -> list[Tensor]:
    """Return both tiers of rows in the pages of their windows' last tokens; all else is NaN."""
    sizes = [(geometry.kernel_size, geometry.kernel_stride), (geometry.coarse_size, geometry.coarse_stride)]
    pools = []
    for means, (size, stride) in zip(tiers(k, geometry), sizes, strict=True):
        pool = torch.full((num_pages, page_size // stride, *means.shape[2:]), torch.nan)
        for b, end in enumerate(ends):
            for window in range(num_windows(end, size, stride)):
                last = window * stride + size - 1
                pool[table[b, last // page_size], last % page_size // stride] = means[b, window]
        pools.append(pool)
    return pools


def attend(backend: str, *tensors: Tensor | None, geometry: SparseGeometry = SMALL, **options) -> Tensor:
    return on_device_of(backend, infllm_attention, *tensors, geometry, scale=SCALE, **options)


@every_backend
@pytest.mark.parametrize(("T", "page_size"), [(1, 48), (5, 16)])
def test_rows_in_pages_are_rows(backend: str, T: int, page_size: int) -> None:
    q, k, v = qkv(T, 150, G=2)
    # the last token of the first row begins a page
    ends = [145, 107]
    positions = torch.stack([torch.arange(end - T, end) for end in ends])
    expected = attend(backend, q, k, v, *tiers(k, SMALL), positions)
    k_pages, v_pages, table = paged(k, v, page_size, ends)
    compressed = paged_tiers(k, table, len(k_pages), page_size, ends)
    actual = attend(backend, q, k_pages, v_pages, *compressed, positions, page_table_BP=table)
    assert_close(actual, expected)


@pytest.mark.parametrize("backend", [name for name in ("cpu", "eager") if unavailable("infllm", name) is None])
@pytest.mark.parametrize("T", [1, 40])
def test_pages_of_256_tokens_are_rows_bit_for_bit(backend: str, T: int) -> None:
    q, k, v = qkv(T, 2200, G=2)
    ends = [2200, 777]
    positions = torch.stack([torch.arange(end - T, end) for end in ends])
    for geometry in (SMALL, replace(SMALL, dense_len=10_000)):
        expected = attend(backend, q, k, v, *tiers(k, geometry), positions, geometry=geometry)
        k_pages, v_pages, table = paged(k, v, 256, ends)
        compressed = paged_tiers(k, table, len(k_pages), 256, ends)
        options = {"geometry": geometry, "page_table_BP": table}
        assert torch.equal(attend(backend, q, k_pages, v_pages, *compressed, positions, **options), expected)


@every_backend
def test_a_row_of_padding_needs_no_pages(backend: str) -> None:
    q, k, v = qkv(3, 150)
    positions = torch.tensor([[147, -1, 149], [-1, -1, -1]])
    k_pages, v_pages, table = paged(k, v, 32, [150, 0])
    compressed = paged_tiers(k, table, len(k_pages), 32, [150, 0])
    actual = attend(backend, q, k_pages, v_pages, *compressed, positions, page_table_BP=table)
    assert_close(actual, attend(backend, q, k, v, *tiers(k, SMALL), positions))
    assert not actual[positions < 0].any() and actual[positions >= 0].all()


@every_backend
def test_rows_share_the_pages_of_their_common_beginning(backend: str) -> None:
    q, k, v = qkv(1, 180)
    k[1, :128], v[1, :128] = k[0, :128], v[0, :128]
    positions = torch.tensor([[179], [140]])
    expected = attend(backend, q, k, v, *tiers(k, SMALL), positions)
    k_pages, v_pages, table = paged(k, v, 32, [180, 141])
    table[1, :4] = table[0, :4]
    compressed = paged_tiers(k, table, len(k_pages), 32, [180, 141])
    actual = attend(backend, q, k_pages, v_pages, *compressed, positions, page_table_BP=table)
    assert torch.equal(actual, expected)


@every_backend
@pytest.mark.parametrize(("start", "T"), [(0, 7), (104, 7), (100, 1)])
def test_start_stands_for_positions_and_short_contexts_are_read_whole(backend: str, start: int, T: int) -> None:
    geometry = replace(SMALL, dense_len=108)
    q, k, v = qkv(T, start + T)
    expected = attend("reference", q, k, v, *tiers(k, geometry), None, geometry=geometry, start=start)
    k_pages, v_pages, table = paged(k, v, 16, [start + T] * 2)
    in_pages = paged_tiers(k, table, len(k_pages), 16, [start + T] * 2, geometry)
    for compressed in (in_pages, (None, None)):
        actual = attend(
            backend, q, k_pages, v_pages, *compressed, None, geometry=geometry, start=start, page_table_BP=table
        )
        assert_close(actual, expected)


@pytest.mark.parametrize("backend", [row("triton"), "eager"])
def test_gradients_reach_the_pages(backend: str) -> None:
    q, k, v = qkv(3, 150)
    positions = torch.stack([torch.arange(147, 150), torch.arange(109, 112)])
    k_pages, v_pages, table = paged(k, v, 16, [150, 112])
    compressed = paged_tiers(k, table, len(k_pages), 16, [150, 112])
    inputs = [x.requires_grad_() for x in (q, k_pages, v_pages)]
    rows = [q, *(x.requires_grad_() for x in (k, v))]
    weight = torch.randn(2, 3, 2, V)
    out = attend(backend, *inputs, *compressed, positions, page_table_BP=table)
    _, dk_pages, dv_pages = torch.autograd.grad((out * weight).sum(), inputs)
    out = attend(backend, *rows, *tiers(k, SMALL), positions)
    _, dk, dv = torch.autograd.grad((out * weight).sum(), rows)
    for d_pages, d in ((dk_pages, dk), (dv_pages, dv)):
        assert_close(d_pages[table[0, :9].long()].flatten(0, 1), d[0, :144])
        assert_close(d_pages[table[1, :7].long()].flatten(0, 1), d[1, :112])


def test_pages_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("cpu", "triton"):
        if unavailable("infllm", backend) is None:
            monkeypatch.setattr("sala.ops.infllm.in_order", None)
            test_rows_share_the_pages_of_their_common_beginning(backend)


@pytest.mark.parametrize("backend", [name for name in BACKENDS["dense"] if unavailable("dense", name) is None])
@pytest.mark.parametrize(("T", "page_size"), [(1, 48), (5, 16), (3, 10)])
def test_dense_attention_reads_pages_as_rows(backend: str, T: int, page_size: int) -> None:
    q, k, v = qkv(T, 150, G=2)
    ends = [145, 107]
    positions = torch.stack([torch.arange(end - T, end) for end in ends])
    k_pages, v_pages, table = paged(k, v, page_size, ends)
    expected = dense_attention(q, k, v, positions, scale=SCALE, backend=backend)
    actual = dense_attention(q, k_pages, v_pages, positions, scale=SCALE, backend=backend, page_table_BP=table)
    # panels of keys end where pages do
    assert_close(actual, expected)
    static = dense_attention(
        q[:, :1],
        k_pages,
        v_pages,
        positions[:, :1],
        scale=SCALE,
        static=True,
        page_table_BP=table.clamp(0, len(k_pages) - 1),
    )
    assert_close(static, expected[:, :1])


@pytest.mark.parametrize("backend", [name for name in BACKENDS["dense"] if unavailable("dense", name) is None])
def test_a_row_s_attention_is_the_same_beside_others(backend: str) -> None:
    """Bit for bit: how a row's keys are cut depends on the row alone."""
    q, k, v = qkv(1, 6000, B=3)
    positions = torch.tensor([[5999], [40], [3000]])
    together = dense_attention(q, k, v, positions, scale=SCALE, backend=backend)
    for b in range(3):
        alone = dense_attention(*(x[b : b + 1] for x in (q, k, v, positions)), scale=SCALE, backend=backend)
        assert torch.equal(together[b : b + 1], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, v, p: (k[:, :-1], v[:, :-1], p), "whole blocks of 16 tokens, not 31 tokens"),
        (lambda k, v, p: (k[:0], v[:0], p), "of at least one page"),
        (lambda k, v, p: (k, v[:-1], p), "pages of keys .* and values .* do not fit"),
        (lambda k, v, p: (k, v, p.long()), "int32 of shape .* not torch.int64"),
        (lambda k, v, p: (k, v, p[0]), r"int32 of shape .* of shape \(7,\)"),
        (lambda k, v, p: (k, v, p.to("meta")), "on cpu, not torch.int32 .* on meta"),
        (lambda k, v, p: (k, v, p[:1]), "do not fit queries"),
        (lambda k, v, p: (k, v, p[:, :4]), "position 149 needs its key, there are 128 keys"),
        (lambda k, v, p: (k, v, p - 20), "row 0 reads up to position 149, and entry [0-4] of its page table is -"),
        (lambda k, v, p: (k[:10], v[:10], p), "of its page table is 1[0-9]: there are pages 0 to 9"),
    ],
)
def test_what_is_no_page_is_refused(change, message: str) -> None:
    q, k, v = qkv(2, 150)
    k_pages, v_pages, table = change(*paged(k, v, 32, [150, 150]))
    compressed = [k_pages.new_empty(len(k_pages), k_pages.shape[1] // stride, 1, K) for stride in (4, 16)]
    positions = torch.arange(148, 150).expand(2, 2)
    with pytest.raises(InputError, match=message):
        infllm_attention(q, k_pages, v_pages, *compressed, positions, SMALL, scale=SCALE, page_table_BP=table)


def test_windows_that_do_not_fit_their_pages_are_refused() -> None:
    q, k, v = qkv(2, 150)
    k_pages, v_pages, table = paged(k, v, 32, [150, 150])
    positions = torch.arange(148, 150).expand(2, 2)
    with pytest.raises(InputError, match=r"compressed keys of keys in 17 pages .* expected \(17, 8, 1, 8\)"):
        infllm_attention(q, k_pages, v_pages, *tiers(k, SMALL), positions, SMALL, scale=SCALE, page_table_BP=table)
