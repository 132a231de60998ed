"""Laws of dense attention by position: against the definition, and what holds however the queries are cut."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sala.ops.dense
from sala.errors import InputError
from sala.ops.dense import dense_attention
from tolerances import assert_close

K, V = 8, 6
SCALE = K**-0.5


def qkv(T: int, S: int, G: int = 2, group: int = 2, B: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (B, T, G * group, K), (B, S, G, K), (B, S, G, V)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def definition(q: Tensor, k: Tensor, v: Tensor, positions_BT: Tensor) -> Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2).double(), v.repeat_interleave(group, 2).double()
    scores_BHTS = torch.einsum("bthk,bshk->bhts", q.double(), k) * SCALE
    hidden_BTS = torch.arange(k.shape[1]) > positions_BT[..., None]
    scores_BHTS = scores_BHTS.masked_fill((hidden_BTS & (positions_BT >= 0)[..., None])[:, None], -torch.inf)
    out_BTHV = torch.einsum("bhts,bshv->bthv", scores_BHTS.softmax(-1), v)
    return out_BTHV.masked_fill((positions_BT < 0)[..., None, None], 0).to(q.dtype)


def run(start: int, T: int, B: int = 2) -> Tensor:
    return torch.arange(start, start + T).expand(B, T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("start", "T"), [(0, 1), (0, 63), (0, 130), (17, 1), (17, 63), (130, 1)])
def test_it_is_causal_softmax_attention(start: int, T: int, group: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(T, start + T + 3, group=group, dtype=dtype)
    expected = definition(q, k, v, run(start, T))
    assert_close(dense_attention(q, k, v, run(start, T), scale=SCALE), expected)
    assert_close(dense_attention(q, k, v, None, scale=SCALE, start=start), expected)


@pytest.mark.parametrize("start", [0, 9])
def test_gradients_are_those_of_the_definition(start: int) -> None:
    inputs = [x.double().requires_grad_() for x in qkv(11, start + 11)]
    weight = torch.randn(2, 11, 4, V, dtype=torch.float64)
    actual = torch.autograd.grad((dense_attention(*inputs, None, scale=SCALE, start=start) * weight).sum(), inputs)
    expected = torch.autograd.grad((definition(*inputs, run(start, 11)) * weight).sum(), inputs)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


def test_rows_may_have_other_lengths_and_padding_reads_nothing() -> None:
    q, k, v = qkv(7, 12, B=4)
    positions = torch.tensor([[-1, -1, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11], [-1] * 7, [0, 1, 2, -1, 3, -1, 4]])
    expected = definition(q, k, v, positions)
    # behind a row's last key memory may hold anything
    for row, last in enumerate(positions.amax(1)):
        k[row, last + 1 :] = v[row, last + 1 :] = torch.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    actual = dense_attention(*inputs, positions, scale=SCALE)
    assert_close(actual, expected)
    assert not actual[2].any()
    actual.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)
    assert not q.grad[positions < 0].any()


def test_positions_may_come_in_any_order() -> None:
    q, k, v = qkv(5, 40, B=1)
    positions = torch.tensor([[39, 0, 17, 3, 17]])
    assert_close(dense_attention(q, k, v, positions, scale=SCALE), definition(q, k, v, positions))


def test_two_prefills_are_one() -> None:
    q, k, v = qkv(50, 50)
    whole = dense_attention(q, k, v, run(0, 50), scale=SCALE)
    parts = [
        dense_attention(q[:, a:b], k[:, :b], v[:, :b], run(a, b - a), scale=SCALE)
        for a, b in pairwise((0, 1, 20, 21, 50))
    ]
    assert_close(torch.cat(parts, 1), whole)


def test_no_mask_of_all_queries_by_all_keys_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sala.ops.dense, "MASK_ELEMENTS", 2**12)
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
        dense_attention(q, k, v, None, scale=SCALE, start=512)
    # the keys, once for each query head
    assert largest <= 1024 * 4 * K < 512 * 1024


def test_a_compiler_takes_a_call_with_start_whole() -> None:
    q, k, v = qkv(16, 16)
    compiled = torch.compile(dense_attention, backend="eager", fullgraph=True)
    assert_close(compiled(q, k, v, None, scale=SCALE, start=0), dense_attention(q, k, v, run(0, 16), scale=SCALE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v, run(0, 4), None), "four dimensions"),
        (lambda q, k, v: (q, k[..., :-1], v, run(0, 4), None), "do not fit"),
        (lambda q, k, v: (q[:, :, :3], k, v, run(0, 4), None), "3 query heads cannot share 2 key heads"),
        (lambda q, k, v: (q, k.double(), v, run(0, 4), None), "one dtype"),
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
