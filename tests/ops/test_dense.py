"""Laws of dense attention by position: every backend against the definition, and what holds however queries are cut."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

import levels
from sala.errors import BackendError, InputError
from sala.ops import native
from sala.ops.dense import dense_attention, eager
from sala.ops.dispatch import BACKENDS, unavailable
from tolerances import assert_close

K, V = 8, 6
SCALE = K**-0.5

BACKENDS_HERE = [name for name in BACKENDS["dense"] if unavailable("dense", name) is None]
every_backend = pytest.mark.parametrize("backend", BACKENDS_HERE)
every_other_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS_HERE if name != "reference"])
needs_library = pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="the C++ library cannot be used here")
every_level = pytest.mark.parametrize("level", levels.TESTED if "cpu" in BACKENDS_HERE else [])


def qkv(T: int, S: int, G: int = 2, group: int = 2, B: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (B, T, G * group, K), (B, S, G, K), (B, S, G, V)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def definition(q: Tensor, k: Tensor, v: Tensor, positions_BT: Tensor) -> Tensor:
    scale = q.shape[3] ** -0.5
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2).double(), v.repeat_interleave(group, 2).double()
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q.double(), k) * scale
    hidden_BTS = torch.arange(k.shape[1]) > positions_BT[..., None]
    scores_BHTS = scores_BHTS.masked_fill((hidden_BTS & (positions_BT >= 0)[..., None])[:, None], -torch.inf)
    out_BTHV = torch.einsum("bhts,bshv->bthv", scores_BHTS.softmax(-1), v)
    return out_BTHV.masked_fill((positions_BT < 0)[..., None, None], 0).to(q.dtype)


def run(start: int, T: int, B: int = 2) -> Tensor:
    return torch.arange(start, start + T).expand(B, T)


@every_backend
@pytest.mark.parametrize("T", [0, 1, 3, 70])
def test_positions_that_only_the_device_knows_need_no_look(
    backend: str, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "MASK_ELEMENTS", 3000)
    q, k, v = qkv(T, 90)
    positions = torch.stack([torch.arange(90 - T, 90), torch.arange(T)])
    positions[1, :2] = -1
    expected = definition(q, k, v, positions)
    assert_close(dense_attention(q, k, v, positions, scale=SCALE, static=True, backend=backend), expected)
    with torch.no_grad():
        assert_close(dense_attention(q, k, v, positions, scale=SCALE, static=True, backend=backend), expected)


@pytest.mark.gpu
def test_a_step_on_a_device_is_near_the_definition() -> None:
    q, k, v = (x.cuda().repeat(1, 1, 1, 8)[..., :48] for x in qkv(1, 193, dtype=torch.bfloat16))
    positions = torch.tensor([[130], [20]])
    expected = definition(*(x.float().cpu() for x in (q, k, v)), positions).bfloat16()
    with torch.no_grad():
        assert_close(dense_attention(q, k, v, positions.cuda(), scale=48**-0.5, static=True).cpu(), expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("start", "T"), [(0, 1), (0, 63), (0, 130), (17, 1), (17, 63), (130, 1)])
def test_it_is_causal_softmax_attention(backend: str, start: int, T: int, group: int, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype not in (torch.float32, torch.bfloat16):
        with pytest.raises(BackendError, match="it takes float32 and bfloat16"):
            dense_attention(*qkv(T, start + T, dtype=dtype), None, scale=SCALE, start=start, backend=backend)
        return
    if backend == "reference" and T > 63:
        return
    q, k, v = qkv(T, start + T + 3, group=group, dtype=dtype)
    expected = definition(q, k, v, run(start, T))
    assert_close(dense_attention(q, k, v, run(start, T), scale=SCALE, backend=backend), expected)
    assert_close(dense_attention(q, k, v, None, scale=SCALE, start=start, backend=backend), expected)


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("start", [0, 9])
def test_gradients_are_those_of_the_definition(start: int, backend: str) -> None:
    inputs = [x.double().requires_grad_() for x in qkv(11, start + 11)]
    weight = torch.randn(2, 11, 4, V, dtype=torch.float64)
    out = dense_attention(*inputs, None, scale=SCALE, start=start, backend=backend)
    actual = torch.autograd.grad((out * weight).sum(), inputs)
    expected = torch.autograd.grad((definition(*inputs, run(start, 11)) * weight).sum(), inputs)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


@every_backend
def test_rows_may_have_other_lengths_and_padding_reads_nothing(backend: str) -> None:
    q, k, v = qkv(7, 12, B=4)
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [-1] * 7, [0, 1, 2, -1, 3, -1, 4]])
    expected = definition(q, k, v, positions)
    # behind a row's last key memory may hold anything
    for row, last in enumerate(positions.amax(1)):
        k[row, last + 1 :] = v[row, last + 1 :] = torch.nan
    q[positions < 0] = torch.nan
    actual = dense_attention(q, k, v, positions, scale=SCALE, backend=backend)
    assert_close(actual, expected)
    assert not actual[2].any()
    if backend == "cpu":
        return
    inputs = [x.requires_grad_() for x in (q, k, v)]
    dense_attention(*inputs, positions, scale=SCALE, backend=backend).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)
    assert not q.grad[positions < 0].any()


@every_backend
def test_positions_may_come_in_any_order(backend: str) -> None:
    q, k, v = qkv(5, 40, B=1)
    positions = torch.tensor([[39, 0, 17, 3, 17]], dtype=torch.int32)
    actual = dense_attention(q, k, v, positions, scale=SCALE, backend=backend)
    assert_close(actual, definition(q, k, v, positions))


@every_backend
def test_two_prefills_are_one(backend: str) -> None:
    q, k, v = qkv(50, 50)
    whole = dense_attention(q, k, v, run(0, 50), scale=SCALE, backend=backend)
    parts = [
        dense_attention(q[:, a:b], k[:, :b], v[:, :b], run(a, b - a), scale=SCALE, backend=backend)
        for a, b in pairwise((0, 1, 20, 21, 50))
    ]
    assert_close(torch.cat(parts, 1), whole)


def test_flash_attention_is_told_that_queries_are_the_last_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(9, 30)
    expected = dense_attention(q, k, v, None, scale=SCALE, start=18, backend="eager")
    # on the CPU torch makes a mask of what it would tell a GPU's kernel
    monkeypatch.setattr(eager, "_runs_flash_attention", lambda q, k, v: True)
    assert_close(dense_attention(q, k, v, None, scale=SCALE, start=18, backend="eager"), expected)


def test_cudnn_comes_behind_kernels_that_need_no_plan_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[int]] = []
    order_now = torch._C._get_sdp_priority_order
    monkeypatch.setattr(eager, "scaled_dot_product_attention", lambda *_, **__: orders.append(order_now()))
    before = order_now()
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, 8, device="cuda:0")
    eager._attention(x, x, x, is_causal=True)
    cudnn = orders[0].index(SDPBackend.CUDNN_ATTENTION.value)
    assert orders[0].index(SDPBackend.FLASH_ATTENTION.value) < cudnn < orders[0].index(SDPBackend.MATH.value)
    assert order_now() == before


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_flash_attention_is_near_the_definition_on_a_device(backward: bool) -> None:
    shapes = (1, 200, 8, 64), (1, 1003, 2, 64), (1, 1003, 2, 64)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(backward) for shape in shapes)
    out = dense_attention(q, k, v, None, scale=0.125, start=800)
    expected = definition(*(x.cpu() for x in (q, k, v)), run(800, 200, 1))
    assert_close(out.cpu(), expected)
    if backward:
        weight = torch.randn_like(out)
        gradients = torch.autograd.grad(out, (q, k, v), weight)
        for gradient, right in zip(gradients, torch.autograd.grad(expected, (q, k, v), weight.cpu()), strict=True):
            assert_close(gradient.cpu(), right.cpu())


@every_backend
def test_an_empty_call_is_empty(backend: str) -> None:
    q, k, v = qkv(0, 5)
    assert dense_attention(q, k, v, None, scale=SCALE, start=2, backend=backend).shape == (2, 0, 4, V)
    assert dense_attention(q, k, v, run(0, 0), scale=SCALE, backend=backend).shape == (2, 0, 4, V)


@every_other_backend
@pytest.mark.parametrize("size", [1e-30, 1e4, 1e18])
def test_scores_of_any_size_are_weighed(backend: str, size: float) -> None:
    q, k, v = qkv(3, 300, B=1)
    positions = torch.tensor([[0, 150, 299]])
    q *= size
    assert_close(dense_attention(q, k, v, positions, scale=SCALE, backend=backend), definition(q, k, v, positions))


@every_other_backend
def test_a_scale_may_be_zero_or_negative(backend: str) -> None:
    q, k, v = qkv(3, 20)
    mean = v.cumsum(1)[:, 17:] / torch.arange(18, 21)[:, None, None]
    actual = dense_attention(q, k, v, None, scale=0.0, start=17, backend=backend)
    assert_close(actual, mean.repeat_interleave(2, 2))
    actual = dense_attention(-q, k, v, None, scale=-SCALE, start=17, backend=backend)
    assert_close(actual, definition(q, k, v, run(17, 3)))


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "start", "G", "group", "width", "value_width"),
    [
        (130, 0, 2, 2, 32, 32),
        (70, 200, 1, 16, 128, 128),
        (140, 33, 2, 5, 64, 24),
        (5, 300, 2, 7, 24, 80),
        (3, 500, 1, 71, 96, 40),
        (1, 2500, 2, 16, 64, 64),
        (1, 5000, 1, 1, 8, 7),
    ],
)
def test_every_level_is_the_definition(
    level: str, T: int, start: int, G: int, group: int, width: int, value_width: int, dtype: torch.dtype
) -> None:
    S = start + T
    # what an outer dimension's stride is, and what stands behind the last key, does not matter
    q = torch.randn(2, G * group, T, width).to(dtype).transpose(1, 2)
    k = torch.randn(2, G, S + 70, width + 3).to(dtype)[..., :width].transpose(1, 2)
    v = torch.randn(2, G, S + 70, value_width).to(dtype).transpose(1, 2)
    expected = definition(q, k[:, :S], v[:, :S], run(start, T))
    k[:, S:] = v[:, S:] = torch.nan
    with native.at_level(level):
        actual = dense_attention(q, k, v, None, scale=width**-0.5, start=start, backend="cpu")
        columns = q.mT.contiguous().mT
        again = dense_attention(columns, k, v, run(start, T), scale=width**-0.5, backend="cpu")
    assert_close(actual, expected)
    assert torch.equal(again, actual)


@needs_library
@pytest.mark.parametrize(("T", "start", "B"), [(200, 0, 1), (1, 4000, 1), (7, 1500, 2)])
def test_the_number_of_threads_changes_no_bit(T: int, start: int, B: int) -> None:
    q, k, v = qkv(T, start + T, group=16, B=B, dtype=torch.bfloat16)
    one = dense_attention(q, k, v, None, scale=SCALE, start=start, backend="cpu")
    torch.set_num_threads(2)
    try:
        two = dense_attention(q, k, v, None, scale=SCALE, start=start, backend="cpu")
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, two)


@needs_library
@settings(max_examples=60)
@given(st.data())
def test_it_is_the_definition_for_all_sizes(data: st.DataObject) -> None:
    T, S = (data.draw(st.integers(1, most), name) for name, most in (("T", 90), ("S", 400)))
    B, G, group = (data.draw(st.integers(1, most), name) for name, most in (("B", 2), ("G", 3), ("group", 18)))
    width, value_width = (data.draw(st.integers(1, 40), name) for name in ("K", "V"))
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16)), "dtype")
    positions = torch.tensor(data.draw(st.lists(st.integers(-1, S - 1), min_size=B * T, max_size=B * T), "positions"))
    positions = positions.view(B, T)
    torch.manual_seed(0)
    q = torch.randn(B, T, G * group, width).to(dtype)
    k, v = torch.randn(B, S, G, width).to(dtype), torch.randn(B, S, G, value_width).to(dtype)
    expected = definition(q, k, v, positions)
    for row, last in enumerate(positions.amax(1)):
        k[row, last + 1 :] = v[row, last + 1 :] = torch.nan
    assert_close(dense_attention(q, k, v, positions, scale=width**-0.5, backend="cpu"), expected)


def test_no_mask_of_all_queries_by_all_keys_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "MASK_ELEMENTS", 2**12)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    q, k, v = qkv(512, 1024, B=1)
    with Largest():
        dense_attention(q, k, v, None, scale=SCALE, start=512, backend="eager")
    # the keys, once for each query head
    assert largest <= 1024 * 4 * K < 512 * 1024


@every_other_backend
def test_a_compiler_takes_a_call_with_start_whole(backend: str) -> None:
    q, k, v = qkv(16, 16)
    compiled = torch.compile(dense_attention, backend="eager", fullgraph=True)
    actual = compiled(q, k, v, None, scale=SCALE, start=0, backend=backend)
    assert_close(actual, dense_attention(q, k, v, run(0, 16), scale=SCALE, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v, run(0, 4), None), "four dimensions"),
        (lambda q, k, v: (q, k[..., :-1], v, run(0, 4), None), "do not fit"),
        (lambda q, k, v: (q[:, :, :3], k, v, run(0, 4), None), "3 query heads cannot share 2 key heads"),
        (lambda q, k, v: (q, k.double(), v, run(0, 4), None), "one dtype"),
        (lambda q, k, v: (q.int(), k.int(), v.int(), run(0, 4), None), "one of float32, .* not torch.int32"),
        (lambda q, k, v: (q, k, v.to("meta"), run(0, 4), None), "values on meta, queries on cpu"),
        (lambda q, k, v: (q, k, v, run(1, 4), None), "position 4 needs its key, there are 4"),
        (lambda q, k, v: (q, k, v, run(0, 4)[:, :3], None), "positions must be"),
        (lambda q, k, v: (q, k, v, run(0, 4).float(), None), "positions must be"),
        (lambda q, k, v: (q, k, v, None, None), "give positions or start"),
        (lambda q, k, v: (q, k, v, None, 1), "need 5 keys, there are 4"),
    ],
)
def test_what_does_not_fit_is_refused(change, message: str) -> None:
    *tensors, start = change(*qkv(4, 4))
    with pytest.raises(InputError, match=message):
        dense_attention(*tensors, scale=SCALE, start=start)
