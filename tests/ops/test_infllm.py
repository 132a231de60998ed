"""Laws of block-sparse attention: every backend against the definition, and what any of them must keep."""

from dataclasses import replace
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import levels
from devices import on_device_of, row
from sala.errors import BackendError, ConfigError, InputError
from sala.ops import native
from sala.ops.dense import dense_attention
from sala.ops.dispatch import BACKENDS, unavailable
from sala.ops.infllm import SparseGeometry, compress, eager, infllm_attention, num_windows, select_blocks
from sala.ops.infllm.cpu.attend import attend_blocks
from tolerances import assert_close

# by this name, for the package has a function of the other
cpu_attend = import_module("sala.ops.infllm.cpu.attend")

K, V = 8, 6
SCALE = K**-0.5
# six blocks of 16 tokens are read, two of them freely chosen
SMALL = SparseGeometry(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=4, dense_len=100)

# the kernels for GPUs, interpreted, are slow: most of their laws are in test_infllm_triton.py, at sizes of their own
BACKENDS_HERE = [name for name in BACKENDS["infllm"] if name != "triton" and unavailable("infllm", name) is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS_HERE)
every_backend_and_triton = pytest.mark.parametrize("backend", [*BACKENDS_HERE, row("triton")])
every_other_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS_HERE if name != "reference"])
every_backend_with_gradients = pytest.mark.parametrize("backend", ["eager", "reference"])
every_level = pytest.mark.parametrize("level", levels.TESTED if "cpu" in BACKENDS_HERE else [])
every_normalizer = pytest.mark.parametrize("normalizer", ["coarse", "exact"])


def qkv(T: int, S: int, G: int = 2, group: int = 2, B: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (B, T, G * group, K), (B, S, G, K), (B, S, G, V)
    q, k, v = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return [2 * q, k, v]


def run(start: int, T: int, B: int = 1) -> Tensor:
    return torch.arange(start, start + T).expand(B, T)


def tiers(k: Tensor, geometry: SparseGeometry) -> tuple[Tensor, Tensor]:
    return (
        compress(k, geometry.kernel_size, geometry.kernel_stride),
        compress(k, geometry.coarse_size, geometry.coarse_stride),
    )


def select(q: Tensor, k: Tensor, positions: Tensor, geometry: SparseGeometry, backend: str = "auto") -> Tensor:
    return on_device_of(backend, select_blocks, q, *tiers(k, geometry), positions, geometry, scale=SCALE)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    geometry: SparseGeometry,
    backend: str = "auto",
    **options,
) -> Tensor:
    compressed = tiers(k, geometry)
    return on_device_of(backend, infllm_attention, q, k, v, *compressed, positions, geometry, scale=SCALE, **options)


def chosen_mask(table_BTGN: Tensor, positions_BT: Tensor, S: int, block_size: int) -> Tensor:
    """Which keys each query's group may see: (B, T, G, S)."""
    block_S = torch.arange(S) // block_size
    in_table = (table_BTGN[..., None, :] == block_S[:, None]).any(-1)
    return in_table & (torch.arange(S) <= positions_BT[..., None])[:, :, None]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen_BTGS: Tensor, scale: float = SCALE) -> Tensor:
    group = q.shape[2] // k.shape[2]
    k, v, seen = (x.repeat_interleave(group, 2) for x in (k, v, seen_BTGS))
    scores = torch.einsum("bthk,bshk->bths", q, k) * scale
    return torch.einsum("bths,bshv->bthv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


# geometry


def test_the_defaults_are_the_released_geometry() -> None:
    geometry = SparseGeometry()
    assert (geometry.num_selected, geometry.coarse_size, geometry.coarse_stride) == (96, 128, 64)
    assert num_windows(8192, 32, 16) == 511
    assert num_windows(8192, geometry.coarse_size, geometry.coarse_stride) == 127
    assert [num_windows(n, 32, 16) for n in (0, 31, 32, 47, 48)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 0}, "kernel_size must be at least 1, not 0"),
        ({"init_blocks": -1}, "init_blocks must not be negative, not -1"),
        ({"topk": 1.5}, "topk must be an integer, not 1.5"),
        ({"kernel_stride": 64}, "kernel_stride 64 exceeds kernel_size 32"),
        ({"kernel_stride": 24}, "multiple of kernel_stride 24"),
        ({"window_size": 100}, "window_size 100 must be a multiple of block_size 64"),
        ({"topk": 1}, "topk 1 must be at least init_blocks \\+ 1 = 2"),
        ({"normalizer": "fine"}, "normalizer must be one of"),
        ({"dense_rule": "batch"}, "dense_rule must be one of"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SparseGeometry(), **change)


# compressed keys


@pytest.mark.parametrize(("size", "stride"), [(32, 16), (8, 8), (5, 3)])
@pytest.mark.parametrize("S", [1, 31, 32, 130])
def test_compressed_keys_are_means_of_complete_windows(S: int, size: int, stride: int) -> None:
    k = torch.randn(2, S, 3, K)
    means = [k[:, first : first + size].mean(1) for first in range(0, S - size + 1, stride)]
    actual = compress(k, size, stride)
    assert actual.shape[1] == len(means)
    if means:
        assert_close(actual, torch.stack(means, 1))


def test_compressed_keys_are_summed_in_float32() -> None:
    k = torch.randn(1, 128, 2, K, dtype=torch.bfloat16) + 100
    assert_close(compress(k, 128, 64), k.double().mean(1, keepdim=True).to(torch.bfloat16), torch.float32)


def test_compressing_pieces_is_compressing_all() -> None:
    k = torch.randn(1, 150, 2, K)
    whole = compress(k, 8, 4)
    pieces = [compress(k[:, 4 * a : 4 * (b - 1) + 8], 8, 4) for a, b in pairwise((0, 1, 2, 17, whole.shape[1]))]
    assert torch.equal(torch.cat(pieces, 1), whole)


# selection


@every_backend_and_triton
def test_block_127_is_read_with_the_first_and_the_window_of_33(backend: str) -> None:
    q, k, _ = qkv(2, 8192, G=1, group=1)
    table = select(q, k, torch.tensor([[8128, 8191]]), SparseGeometry(), backend)
    forced = {0, *range(95, 128)}
    for blocks in table[0, :, 0].tolist():
        assert len(set(blocks)) == 96 and forced <= set(blocks) and blocks == sorted(blocks)
    assert len(forced) == 34


@every_other_backend
@every_normalizer
@pytest.mark.parametrize(("block", "size", "stride"), [(16, 4, 4), (16, 32, 8), (32, 8, 4), (64, 32, 16), (48, 5, 3)])
@pytest.mark.parametrize(("G", "group"), [(1, 1), (2, 3), (1, 16)])
@pytest.mark.parametrize(("init", "window", "topk"), [(0, 0, 2), (1, 1, 3), (2, 1, 3)])
def test_a_backend_is_the_definition(
    backend: str,
    normalizer: str,
    block: int,
    size: int,
    stride: int,
    G: int,
    group: int,
    init: int,
    window: int,
    topk: int,
) -> None:
    geometry = SparseGeometry(size, stride, init, block, window * block, topk, 0, normalizer)
    S = 7 * block + 5
    q, k, v = qkv(9, S, G, group)
    positions = torch.tensor([[-1, 0, size - 1, block, 2 * block + 3, 4 * block - 1, 5 * block, S - 2, S - 1]])
    assert torch.equal(select(q, k, positions, geometry, backend), select(q, k, positions, geometry, "reference"))
    expected = attend(q, k, v, positions, geometry, "reference")
    assert_close(attend(q, k, v, positions, geometry, backend), expected)


@every_other_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("T", [1, 63, 130])
def test_a_backend_is_the_definition_in_every_dtype(backend: str, T: int, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype != torch.bfloat16:
        with pytest.raises(BackendError, match="it takes float32 and bfloat16"):
            attend(*qkv(1, 160, dtype=dtype), run(159, 1), SMALL, backend)
        return
    q, k, v = qkv(T, 160, dtype=dtype)
    positions = run(160 - T, T)
    expected = attend(q, k, v, positions, SMALL, "reference")
    assert_close(attend(q, k, v, positions, SMALL, backend), expected)


@every_other_backend
def test_tiles_leave_no_seam(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(150, 300)
    whole = attend(q, k, v, run(150, 150), SMALL, backend)
    monkeypatch.setattr(eager, "SELECT_QUERIES", 7)
    monkeypatch.setattr(eager, "ATTEND_QUERIES", 31)
    monkeypatch.setattr(eager, "SCORE_ELEMENTS", 64)
    assert_close(attend(q, k, v, run(150, 150), SMALL, backend), whole)


@every_backend_and_triton
def test_of_equal_scores_the_lower_block_wins(backend: str) -> None:
    # all keys equal: every window of every block scores the same
    q, k = torch.randn(1, 2, 2, K), torch.randn(K).expand(1, 320, 1, K).contiguous()
    table = select(q, k, torch.tensor([[303, 319]]), SMALL, backend)
    assert table.tolist() == [[[[0, 1, 2, 16, 17, 18]], [[0, 1, 2, 17, 18, 19]]]]


@every_backend_and_triton
def test_of_two_blocks_that_share_the_best_window_the_lower_is_taken_first(backend: str) -> None:
    geometry = replace(SMALL, topk=3)  # one free block
    q, k = torch.zeros(1, 1, 1, K), torch.zeros(1, 320, 1, K)
    q[..., 0] = k[0, 94:98, 0, 0] = 4  # the window of tokens 92..99 straddles blocks 5 and 6
    assert select(q, k, torch.tensor([[319]]), geometry, backend).tolist() == [[[[0, 5, 17, 18, 19]]]]


@every_backend_and_triton
def test_blocks_that_must_be_read_survive_scores_beyond_float32(backend: str) -> None:
    q, k = torch.zeros(1, 1, 1, K), torch.zeros(1, 320, 1, K)
    q[..., 0], k[0, 32:96, 0, 0] = 1e3, 1.0
    k[0, 96:128, 0, 0] = -1.0
    geometry = replace(SMALL, kernel_size=16, kernel_stride=16)
    assert {0, 17, 18, 19} <= set(select(q, k, torch.tensor([[319]]), geometry, backend).flatten().tolist())


@every_backend_and_triton
@every_normalizer
def test_a_query_without_a_coarse_window_uses_the_exact_normaliser(backend: str, normalizer: str) -> None:
    # at position 60 of 64 no coarse window of 64 tokens is complete, and three of eight blocks are chosen
    geometry = SparseGeometry(16, 8, 1, 8, 0, 4, 0, normalizer)
    q, k, _ = qkv(1, 64, G=1, group=4)
    position = torch.tensor([[60]])
    exact = select(q, k, position, replace(geometry, normalizer="exact"), "reference")
    assert torch.equal(select(q, k, position, geometry, backend), exact)


def test_the_coarse_normaliser_chooses_nearly_the_same_blocks() -> None:
    geometry = SparseGeometry(dense_len=0, window_size=128, topk=20)
    q, k, _ = qkv(32, 8192, G=1, group=16)
    positions = torch.linspace(6144, 8191, 32).long()[None]
    tables = [select(q, k, positions, replace(geometry, normalizer=name)) for name in ("coarse", "exact")]
    same = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(*(t.flatten(0, 2) for t in tables), strict=True))
    forced = 4  # the first block, the window of two and the query's own
    num_free = tables[0].shape[-1] - forced
    assert same / len(positions[0]) - forced >= 0.9 * num_free


@every_backend
def test_the_future_is_invisible(backend: str) -> None:
    q, k, v = qkv(4, 200)
    positions = torch.tensor([[99, 120, 150, 150]])
    before = attend(q, k, v, positions, SMALL, backend), select(q, k, positions, SMALL, backend)
    k[:, 151:], v[:, 151:] = torch.nan, torch.nan
    assert torch.equal(attend(q, k, v, positions, SMALL, backend), before[0])
    table = select(q, k, positions, SMALL, backend)
    assert torch.equal(table, before[1])
    assert (table <= positions[..., None, None] // 16).all()


@every_backend_and_triton
def test_where_fewer_blocks_exist_the_table_ends_in_minus_one(backend: str) -> None:
    q, k, _ = qkv(2, 40)
    table = select(q, k, torch.tensor([[-1, 39]]), SMALL, backend)
    assert table.dtype == torch.int32
    assert table[0, :, 0].tolist() == [[-1] * 6, [0, 1, 2, -1, -1, -1]]


# attention


@every_backend_with_gradients
def test_it_is_dense_attention_under_the_mask_of_the_selection(backend: str) -> None:
    T, S = (40, 150) if backend == "reference" else (140, 300)
    inputs = [x.requires_grad_() for x in qkv(T, S, dtype=torch.float64)]
    positions = run(S - T, T)
    table = select(inputs[0], inputs[1], positions, SMALL, backend)
    seen = chosen_mask(table, positions, S, SMALL.block_size)
    weight = torch.randn(1, T, 4, V, dtype=torch.float64)
    actual, expected = attend(*inputs, positions, SMALL, backend), masked_attention(*inputs, seen)
    assert_close(actual, expected)
    assert not seen[:, -1].all(-1).any()
    pairs = [torch.autograd.grad((out * weight).sum(), inputs) for out in (actual, expected)]
    for a, b in zip(*pairs, strict=True):
        assert_close(a, b)


def test_gradients_of_bfloat16_are_near_those_of_float64() -> None:
    inputs = [x.bfloat16().requires_grad_() for x in qkv(60, 200)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    seen = chosen_mask(select(*inputs[:2], run(140, 60), SMALL), run(140, 60), 200, 16)
    attend(*inputs, run(140, 60), SMALL).sum().backward()
    masked_attention(*wide, seen).sum().backward()
    for narrow, exact in zip(inputs, wide, strict=True):
        assert_close(narrow.grad, exact.grad.bfloat16())


@every_backend_and_triton
def test_it_is_dense_attention_when_everything_is_selected(backend: str) -> None:
    geometry = replace(SMALL, topk=20, dense_len=0)
    q, k, v = qkv(20, 300, B=2)
    expected = dense_attention(q, k, v, run(280, 20, 2), scale=SCALE)
    assert_close(attend(q, k, v, run(280, 20, 2), geometry, backend), expected)


@every_backend
@pytest.mark.parametrize("rule", ["position", "sequence"])
def test_the_released_geometry_is_dense_below_6144(backend: str, rule: str) -> None:
    geometry = SparseGeometry(dense_len=0, dense_rule=rule)
    q, k, v = qkv(6, 8200, G=1, group=2)
    positions = torch.tensor([[0, 127, 4096, 6143, 6144, 8199]])
    dense = dense_attention(q, k, v, positions, scale=SCALE)
    actual = attend(q, k, v, positions, geometry, backend)
    assert_close(actual[:, :4], dense[:, :4])
    assert (actual[:, 4:] - dense[:, 4:]).abs().amax((0, 2, 3)).min() > 1e-3


@every_backend_and_triton
def test_a_query_is_dense_until_its_own_context_is_long_enough(backend: str) -> None:
    geometry = replace(SMALL, dense_len=140)
    q, k, v = qkv(4, 200)
    positions = torch.tensor([[137, 138, 139, 199]])
    dense = dense_attention(q, k, v, positions, scale=SCALE)
    sparse = attend(q, k, v, positions, replace(geometry, dense_len=0), backend)
    actual = attend(q, k, v, positions, geometry, backend)
    assert_close(actual, torch.cat([dense[:, :2], sparse[:, 2:]], 1))
    assert not torch.allclose(dense, sparse)


@every_backend
def test_the_sequence_rule_decides_for_the_whole_call(backend: str) -> None:
    geometry = replace(SMALL, dense_rule="sequence", dense_len=140)
    q, k, v = qkv(140, 140)
    sparse = attend(q, k, v, run(0, 140), replace(geometry, dense_len=0), backend)
    assert_close(attend(q, k, v, run(0, 140), geometry, backend), sparse)
    dense = dense_attention(q[:, :-1], k, v, run(0, 139), scale=SCALE)
    assert_close(attend(q[:, :-1], k, v, run(0, 139), geometry, backend), dense)
    # the released rule is why one call and chunks disagree
    assert not torch.allclose(dense, sparse[:, :-1])


@every_other_backend
def test_two_prefills_and_decoding_are_one_call(backend: str) -> None:
    q, k, v = qkv(180, 180)
    whole = attend(q, k, v, run(0, 180), SMALL, backend)
    parts = [
        attend(q[:, a:b], k[:, :b], v[:, :b], run(a, b - a), SMALL, backend)
        for a, b in pairwise((0, 50, 98, 99, 100, 101, 130, 177, 178, 179, 180))
    ]
    assert_close(torch.cat(parts, 1), whole)


@every_other_backend
def test_rows_are_independent_and_padding_reads_nothing(backend: str) -> None:
    q, k, v = qkv(40, 200, B=4)
    positions = torch.full((4, 40), -1)
    positions[0, 10:] = run(170, 30)[0]
    positions[1] = run(90, 40)[0]
    positions[3, [1, 5, 39]] = torch.tensor([30, 199, 120])
    alone = [
        attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], positions[b : b + 1], SMALL, "reference") for b in range(4)
    ]
    actual = attend(q, k, v, positions, SMALL, backend)
    assert_close(actual, torch.cat(alone))
    assert not actual[positions < 0].any()
    decoded = attend(q[:, -1:], k, v, positions[:, -1:], SMALL, backend)
    assert_close(decoded, actual[:, -1:])


@every_other_backend
def test_memory_behind_a_rows_last_key_is_not_read(backend: str) -> None:
    q, k, v = (x.requires_grad_(backend != "cpu") for x in qkv(30, 200, B=2))
    positions = torch.stack([run(100, 30)[0], run(150, 30)[0]])
    k1, k2 = tiers(k, SMALL)
    expected = attend(q, k, v, positions, SMALL, backend)
    with torch.no_grad():
        k[0, 130:], v[0, 130:], k[1, 180:], v[1, 180:] = torch.nan, torch.nan, torch.nan, torch.nan
        k1[0, num_windows(130, 8, 4) :] = k2[0, num_windows(130, 32, 16) :] = torch.nan
    actual = infllm_attention(q, k, v, k1, k2, positions, SMALL, scale=SCALE, backend=backend)
    assert torch.equal(actual, expected)
    if backend != "cpu":
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(actual.sum(), (q, k, v)))


@every_backend
def test_start_stands_for_positions_and_missing_windows_are_made(backend: str) -> None:
    q, k, v = qkv(12, 140, B=2)
    expected = attend(q, k, v, run(128, 12, 2), SMALL, backend)
    actual = infllm_attention(q, k, v, None, None, None, SMALL, scale=SCALE, start=128, backend=backend)
    assert torch.equal(actual, expected)


def test_a_compiler_takes_a_dense_call_whole() -> None:
    q, k, v = qkv(16, 16)
    compiled = torch.compile(infllm_attention, backend="eager", fullgraph=True)
    actual = compiled(q, k, v, None, None, None, SMALL, scale=SCALE, start=0)
    assert_close(actual, dense_attention(q, k, v, run(0, 16), scale=SCALE))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_no_gradient_flows_through_the_selection(backend: str) -> None:
    q, k, v = qkv(30, 200)
    k1, k2 = (x.requires_grad_() for x in tiers(k, SMALL))
    q.requires_grad_()
    infllm_attention(q, k, v, k1, k2, run(170, 30), SMALL, scale=SCALE, backend=backend).sum().backward()
    assert q.grad is not None and k1.grad is None and k2.grad is None


@pytest.mark.parametrize(
    ("backend", "grad"),
    [(b, g) for b in BACKENDS_HERE if b != "reference" for g in (False, True) if not (g and b == "cpu")],
)
@every_normalizer
def test_memory_grows_with_queries_and_windows_not_with_their_product(
    backend: str, normalizer: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "SELECT_QUERIES", 16)
    monkeypatch.setattr(eager, "ATTEND_QUERIES", 64)
    monkeypatch.setattr(eager, "SCORE_ELEMENTS", 2**12)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    T = 1024
    inputs = [x.requires_grad_(grad) for x in qkv(T, T, G=1)]
    with Largest():
        out = attend(*inputs, run(0, T), replace(SMALL, dense_len=0, normalizer=normalizer), backend)
        if grad:
            out.sum().backward()
    # the inputs and a dense head of 96 tokens; never T x T / stride
    assert largest <= 32 * T < T * T // SMALL.kernel_stride


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, k1, k2, p: (q, k, v, k1[:, :-1], k2, p), "hold 48 windows; position 199 sees 49"),
        (lambda q, k, v, k1, k2, p: (q, k, v, k1, k2[:, :5], p), "coarse compressed keys hold 5 windows"),
        (lambda q, k, v, k1, k2, p: (q, k, v, k1[..., :-1], k2, p), "compressed keys must have the shape"),
        (lambda q, k, v, k1, k2, p: (q, k, v, k1, k2, p + 1), "position 200 needs its key"),
        (lambda q, k, v, k1, k2, p: (q, k, v, k1, k2, p[0]), "positions must be"),
        (lambda q, k, v, k1, k2, p: (q[:, :, :3], k, v, k1, k2, p), "3 query heads cannot share 2 key heads"),
        (lambda q, k, v, k1, k2, p: (q, k, v.half(), k1, k2, p), "one dtype"),
        (lambda q, k, v, k1, k2, p: (q.int(), k.int(), v.int(), k1, k2, p), "one of float32, .* not torch.int32"),
        (
            lambda q, k, v, k1, k2, p: (q, k, v, k1.int(), k2, p),
            "compressed keys must be one of float32, .* not torch.int32",
        ),
        (lambda q, k, v, k1, k2, p: (q, k, v, k1.to("meta"), k2, p), "compressed keys on meta, queries on cpu"),
        (lambda q, k, v, k1, k2, p: (q, k, v, k1, k2.to("meta"), p), "coarse compressed keys on meta, queries on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, message: str) -> None:
    q, k, v = qkv(3, 200)
    tensors = change(q, k, v, *tiers(k, SMALL), run(197, 3))
    with pytest.raises(InputError, match=message):
        infllm_attention(*tensors, SMALL, scale=SCALE)


@every_normalizer
def test_a_selection_takes_tensors_of_one_device(normalizer: str) -> None:
    geometry = replace(SMALL, normalizer=normalizer)
    q, k, _ = qkv(3, 200)
    tensors = [q, *tiers(k, geometry), run(197, 3)]
    for i, name in enumerate(("queries", "compressed keys", "coarse compressed keys", "positions")):
        moved = [x.to("meta") if i == n else x for n, x in enumerate(tensors)]
        with pytest.raises(InputError, match=f"{name if i else 'positions'} on (meta|cpu), queries on (cpu|meta)"):
            select_blocks(*moved, geometry, scale=SCALE)


@every_backend_and_triton
@pytest.mark.parametrize(("B", "T"), [(0, 3), (2, 0), (0, 0)])
def test_no_queries_read_nothing(backend: str, B: int, T: int) -> None:
    q, k, v = qkv(T, 200, B=B)
    positions = run(197, T, B)
    assert attend(q, k, v, positions, SMALL, backend).shape == (B, T, 4, V)
    assert attend(q, k, v, None, SMALL, backend, start=197).shape == (B, T, 4, V)
    assert attend(q, k, v, positions, SMALL, backend, static=True).shape == (B, T, 4, V)
    assert select(q, k, positions, SMALL, backend).shape == (B, T, 2, SMALL.num_selected)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="eager"):
        attend(*qkv(1, 8), run(7, 1), SMALL, "egaer")


# the C++ alone, under tables that no selection would make


def tables(T: int, start: int, G: int, block_size: int, most: int) -> Tensor:
    """Each query's own block and up to `most` - 1 of those before it, (1, T, G, most)."""
    table = torch.full((1, T, G, most), -1, dtype=torch.int32)
    for t in range(T):
        own = (start + t) // block_size
        for g in range(G):
            count = int(torch.randint(min(most, own + 1), ()))
            blocks = [*torch.randperm(own)[:count].sort().values.tolist(), own]
            table[0, t, g, : count + 1] = torch.tensor(blocks)
    return table


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "start", "G", "group", "width", "value_width", "block_size", "most"),
    [
        (70, 600, 1, 16, 128, 128, 64, 6),
        (130, 500, 2, 2, 64, 64, 32, 9),
        (40, 300, 1, 5, 32, 32, 16, 12),
        (9, 200, 2, 1, 24, 80, 5, 30),
        (3, 700, 1, 71, 96, 40, 300, 2),
        (1, 6000, 2, 8, 128, 128, 64, 70),
    ],
)
def test_any_blocks_are_read_at_every_level(
    level: str,
    T: int,
    start: int,
    G: int,
    group: int,
    width: int,
    value_width: int,
    block_size: int,
    most: int,
    dtype: torch.dtype,
) -> None:
    S = start + T
    q = torch.randn(1, G * group, T, width).to(dtype).transpose(1, 2)
    k = torch.randn(1, S + 70, G, width + 3).to(dtype)[..., :width]
    v = torch.randn(1, G, S + 70, value_width).to(dtype).transpose(1, 2)
    table, positions = tables(T, start, G, block_size, most), run(start, T)
    first_sparse = torch.tensor([start + 2])
    seen = chosen_mask(table, positions, S, block_size)
    seen |= (positions[..., None] < first_sparse)[..., None] & (torch.arange(S) <= positions[..., None])[:, :, None]
    expected = masked_attention(*(x[:, :S].double() for x in (q, k, v)), seen, scale=width**-0.5).to(dtype)
    k[:, S:] = v[:, S:] = torch.nan
    with native.at_level(level):
        actual = attend_blocks(q, k, v, positions, table, first_sparse, None, block_size, width**-0.5)
    assert_close(actual, expected)


@pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="the C++ library cannot be used here")
@pytest.mark.parametrize(("T", "start"), [(150, 700), (1, 5000), (3, 5000)])
def test_the_number_of_threads_changes_no_bit(T: int, start: int) -> None:
    q, k, v = qkv(T, start + T, group=16, dtype=torch.bfloat16)
    arguments = (run(start, T), tables(T, start, 2, 16, 200), torch.zeros(1, dtype=torch.int64), None, 16, SCALE)
    one = attend_blocks(q, k, v, *arguments)
    torch.set_num_threads(2)
    try:
        two = attend_blocks(q, k, v, *arguments)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, two)


@every_other_backend
def test_long_calls_are_cut_without_a_seam(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(180, 180, B=2)
    positions = torch.stack([run(0, 180)[0], run(0, 180)[0] - 20])
    whole = attend(q, k, v, positions, SMALL, backend)
    monkeypatch.setattr(cpu_attend, "QUERIES", 37)
    assert_close(attend(q, k, v, positions, SMALL, backend), whole)
