"""Laws of lightning attention: every backend against the definition, and what any of them must keep."""

from copy import copy
from importlib import import_module
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import levels
from devices import GPU, memory_for, needs_triton, on_device_of, row
from sala.errors import BackendError, InputError
from sala.ops import gpu, lightning
from sala.ops.dispatch import BACKENDS
from sala.ops.lightning import log_decay
from sala.ops.native import at_level
from tolerances import assert_close

B, H, K, V = 2, 3, 8, 5
SCALE = K**-0.5

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES_OF = {"cpu": DTYPES[:2], "triton": DTYPES[:3]}
OTHERS = [name for name in BACKENDS["lightning"] if name != "reference"]
DIFFERENTIABLE = [name for name in BACKENDS["lightning"] if name != "cpu"]

every_backend = pytest.mark.parametrize("backend", [row(name) for name in BACKENDS["lightning"]])
every_other_backend = pytest.mark.parametrize("backend", [row(name) for name in OTHERS])
every_differentiable_backend = pytest.mark.parametrize("backend", [row(name) for name in DIFFERENTIABLE])
every_other_backend_and_dtype = pytest.mark.parametrize(
    ("backend", "dtype"), [row(name, dtype) for name in OTHERS for dtype in DTYPES_OF.get(name, DTYPES)]
)
every_level = pytest.mark.parametrize("level", levels.TESTED)


def qkv(T: int, rows: int = B, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(2, rows, T, H, K, dtype=dtype)
    return q, k, torch.randn(rows, T, H, V, dtype=dtype)


def state(rows: int = B, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, H, K, V, dtype=dtype)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def lightning_attention(*tensors: Tensor, backend: str = "auto", **options) -> tuple[Tensor, Tensor]:
    return on_device_of(backend, lightning.lightning_attention, *tensors, **options)


def attend(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    return lightning_attention(q, k, v, log_decay(q.shape[2]), scale=SCALE, **options)


# slopes


def test_slopes_are_the_released_ones() -> None:
    slopes_H = -log_decay(32)
    assert slopes_H.dtype == torch.float32
    for head, slope in {0: 0.8408964, 1: 0.7071068, 31: 0.00390625}.items():
        assert slopes_H[head].item() == pytest.approx(slope, rel=1e-7)


def test_decays_of_eight_heads_are_those_of_halo() -> None:
    expected = [0.6065, 0.7788, 0.8825, 0.9394, 0.9692, 0.9845, 0.9922, 0.9961]
    assert log_decay(8).exp().tolist() == pytest.approx(expected, abs=5e-5)


def test_slopes_of_other_head_counts_interleave_the_next_series() -> None:
    def series(n: int) -> Tensor:
        return 2.0 ** (-8 / n * torch.arange(1, n + 1))

    torch.testing.assert_close(-log_decay(6), torch.cat([series(4), series(8)[::2][:2]]))
    torch.testing.assert_close(-log_decay(12), torch.cat([series(8), series(16)[::2][:4]]))
    torch.testing.assert_close(-log_decay(1), series(1))


def test_no_heads_are_refused() -> None:
    with pytest.raises(InputError, match="at least 1, not 0"):
        log_decay(0)


# against the definition


@every_other_backend_and_dtype
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 327])
def test_backends_agree_with_the_definition(backend: str, dtype: torch.dtype, masked: bool, T: int) -> None:
    inputs = qkv(T, dtype=dtype)
    mask_BT = torch.rand(B, T) > 0.3 if masked else None
    for initial in (None, state(dtype=state_dtype(dtype))):
        options = {"mask_BT": mask_BT, "initial_state_BHKV": initial}
        out, final = attend(*inputs, **options, backend=backend)
        expected_out, expected_final = attend(*inputs, **options, backend="reference")
        assert_close(out, expected_out)
        # a state is stored in float32 and summed from products of the inputs' precision
        assert_close(final, expected_final, dtype)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [row(name, dtype) for name in ("eager", "triton") for dtype in (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [1, 65, 130])
def test_gradients_agree_with_the_definition(backend: str, dtype: torch.dtype, masked: bool, T: int) -> None:
    mask_BT = torch.rand(B, T) > 0.3 if masked else None
    inputs = [x.requires_grad_() for x in (*qkv(T, dtype=dtype), state())]
    out_weights, state_weights = torch.randn(B, T, H, V), state()

    def gradients(name: str) -> tuple[Tensor, ...]:
        q, k, v, initial = inputs
        out, final = attend(q, k, v, initial_state_BHKV=initial, mask_BT=mask_BT, backend=name)
        return torch.autograd.grad((out.float() * out_weights).sum() + (final * state_weights).sum(), inputs)

    for gradient, expected in zip(gradients(backend), gradients("reference"), strict=True):
        assert_close(gradient, expected, dtype)


@pytest.mark.parametrize("T", [1, 5, 67])
def test_gradients_are_the_derivatives(T: int) -> None:
    q, k = torch.randn(2, 1, T, 2, 2, dtype=torch.float64)
    v, initial = torch.randn(1, T, 2, 1, dtype=torch.float64), torch.randn(1, 2, 2, 1, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, initial)]
    mask_BT = torch.arange(T)[None] != 1

    def masked(q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, initial_state_BHKV=initial, mask_BT=mask_BT)

    def unmasked(q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, initial_state_BHKV=initial)

    for function in (unmasked, masked):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@every_backend
@pytest.mark.parametrize("T", [1, 63, 130, 1100])
def test_the_closed_form_holds(backend: str, T: int) -> None:
    dtype = torch.float32 if backend in ("cpu", "triton") else torch.float64
    q, k, v = qkv(T, rows=1, dtype=dtype)
    position_T = torch.arange(T)
    age_TT = position_T[:, None] - position_T
    decay_HTT = torch.where(age_TT >= 0, (log_decay(H).double()[:, None, None] * age_TT.clamp_min(0)).exp(), 0)
    scores_BHTT = SCALE * torch.einsum("bthk,bshk->bhts", q.double(), k.double()) * decay_HTT
    out, _ = attend(q, k, v, backend=backend)
    assert_close(out, torch.einsum("bhts,bshv->bthv", scores_BHTT, v.double()).to(dtype))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_wide_heads_agree_with_the_definition(backend: str) -> None:
    # a state too large to hold those of many chunks at once
    q, k, v = torch.randn(3, 1, 130, 1, 600)
    for actual, expected in zip(attend(q, k, v, backend=backend), attend(q, k, v, backend="reference"), strict=True):
        assert_close(actual, expected)


# laws


@every_backend
def test_the_state_decays_before_a_token_is_added_and_is_read_after(backend: str) -> None:
    one = torch.ones(1, 1, 1, 1)
    slope_H = torch.tensor([-1.0])
    out, final = lightning_attention(one, 3 * one, one, slope_H, scale=0.5, initial_state_BHKV=2 * one, backend=backend)
    assert final.item() == pytest.approx(2 * 0.36787944 + 3)
    assert out.item() == pytest.approx(0.5 * final.item())


@every_backend
def test_the_future_is_invisible(backend: str) -> None:
    T, now = 130, 70
    q, k, v = qkv(T)
    before, _ = attend(q, k, v, backend=backend)
    for x in (q, k, v):
        x[:, now:] = torch.randn_like(x[:, now:])
    after, _ = attend(q, k, v, backend=backend)
    assert torch.equal(before[:, :now], after[:, :now])
    assert not torch.equal(before[:, now], after[:, now])


@every_backend
@pytest.mark.parametrize("cut", [1, 63, 64, 65, 129])
def test_two_prefills_are_one(backend: str, cut: int) -> None:
    inputs = qkv(130)
    whole, final = attend(*inputs, initial_state_BHKV=state(), backend=backend)
    torch.manual_seed(0)
    inputs = qkv(130)
    first, between = attend(*(x[:, :cut] for x in inputs), initial_state_BHKV=state(), backend=backend)
    second, last = attend(*(x[:, cut:] for x in inputs), initial_state_BHKV=between, backend=backend)
    assert_close(torch.cat([first, second], dim=1), whole)
    assert_close(last, final)


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_any_splits_are_one_call(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = qkv(sum(lengths), rows=1)
    mask_BT = torch.rand(1, sum(lengths)) > 0.2
    whole, final = attend(*inputs, mask_BT=mask_BT)
    out, carried = [], None
    for *part, mask in zip(*(x.split(lengths, dim=1) for x in (*inputs, mask_BT)), strict=True):
        part_out, carried = attend(*part, mask_BT=mask, initial_state_BHKV=carried)
        out.append(part_out)
    assert_close(torch.cat(out, dim=1), whole)
    assert_close(carried, final)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [row(name, dtype) for name in BACKENDS["lightning"] for dtype in (torch.float32, torch.bfloat16)],
)
def test_step_by_step_is_one_call(backend: str, dtype: torch.dtype) -> None:
    T = 66
    inputs = qkv(T, rows=1, dtype=dtype)
    whole, final = attend(*inputs, backend=backend)
    out, carried = [], None
    for t in range(T):
        token_out, carried = attend(*(x[:, t : t + 1] for x in inputs), initial_state_BHKV=carried, backend=backend)
        out.append(token_out)
    assert_close(torch.cat(out, dim=1), whole)
    assert_close(carried, final, dtype)


@every_backend
def test_batch_rows_are_independent(backend: str) -> None:
    inputs, initial = qkv(70, rows=3), state(3)
    out, final = attend(*inputs, initial_state_BHKV=initial, backend=backend)
    for index in range(3):
        own = slice(index, index + 1)
        own_out, own_final = attend(*(x[own] for x in inputs), initial_state_BHKV=initial[own], backend=backend)
        assert_close(out[own], own_out)
        assert_close(final[own], own_final)


@every_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bounds", [[0, 1, 66, 66, 130], [0, 1, 4, 4, 9]], ids=["chunks", "steps"])
def test_packed_rows_are_separate_rows(backend: str, dtype: torch.dtype, masked: bool, bounds: list[int]) -> None:
    T = bounds[-1]
    inputs, initial = qkv(T, rows=1), state(4)
    mask_BT = torch.rand(1, T) > 0.3 if masked else None
    cu_seqlens = torch.tensor(bounds, dtype=dtype)
    out, final = attend(*inputs, initial_state_BHKV=initial, cu_seqlens=cu_seqlens, mask_BT=mask_BT, backend=backend)
    for index, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            assert torch.equal(final[index], initial[index])
            continue
        own = [x[:, start:end] for x in inputs]
        own_mask = mask_BT[:, start:end] if masked else None
        own_out, own_final = attend(
            *own, initial_state_BHKV=initial[index : index + 1], mask_BT=own_mask, backend=backend
        )
        assert_close(out[:, start:end], own_out)
        assert_close(final[index : index + 1], own_final)


@every_differentiable_backend
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_packed_rows_are_those_of_separate_rows(backend: str, masked: bool) -> None:
    bounds = [0, 1, 66, 66, 130]
    inputs, initial = [x.requires_grad_() for x in qkv(130, rows=1)], state(4)
    mask_BT = torch.rand(1, 130) > 0.3 if masked else None
    out, _ = attend(
        *inputs, initial_state_BHKV=initial, cu_seqlens=torch.tensor(bounds), mask_BT=mask_BT, backend=backend
    )
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    for index, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        own = [x[:, start:end].detach().requires_grad_() for x in inputs]
        own_mask = mask_BT[:, start:end] if masked else None
        own_out, _ = attend(*own, initial_state_BHKV=initial[index : index + 1], mask_BT=own_mask, backend=backend)
        own_gradients = torch.autograd.grad((own_out * weights[:, start:end]).sum(), own)
        for gradient, expected in zip(gradients, own_gradients, strict=True):
            assert_close(gradient[:, start:end], expected)


@every_backend
@pytest.mark.parametrize("T", [1, 66])
def test_left_padding_is_none(backend: str, T: int) -> None:
    pads = 7
    inputs, initial = qkv(T), state()
    out, final = attend(*inputs, initial_state_BHKV=initial, backend=backend)
    padded = [torch.cat([torch.randn_like(x[:, :1]).expand(-1, pads, -1, -1), x], dim=1) for x in inputs]
    mask_BT = (torch.arange(pads + T) >= pads).expand(B, -1)
    padded_out, padded_final = attend(*padded, initial_state_BHKV=initial, mask_BT=mask_BT, backend=backend)
    assert not padded_out[:, :pads].any()
    assert_close(padded_out[:, pads:], out)
    assert_close(padded_final, final)


@every_backend
def test_a_row_without_tokens_keeps_its_state(backend: str) -> None:
    initial = state()
    out, final = attend(
        *qkv(3), initial_state_BHKV=initial, mask_BT=torch.tensor([[False] * 3, [True] * 3]), backend=backend
    )
    assert not out[0].any()
    assert torch.equal(final[0], initial[0])
    assert not torch.equal(final[1], initial[1])


@every_backend
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("T", [1, 70])
def test_masked_tokens_poison_nothing(backend: str, poison: float, T: int) -> None:
    mask_BT = torch.rand(B, T) > 0.5
    clean, initial = qkv(T), state()
    poisoned = [torch.where(mask_BT[..., None, None], x, poison) for x in clean]
    expected_out, expected_final = attend(*clean, mask_BT=mask_BT, initial_state_BHKV=initial, backend=backend)
    out, final = attend(*poisoned, mask_BT=mask_BT, initial_state_BHKV=initial, backend=backend)
    assert torch.equal(out, expected_out)
    assert torch.equal(final, expected_final)
    if backend in DIFFERENTIABLE and mask_BT.any():
        poisoned = [x.requires_grad_() for x in poisoned]
        out, final = attend(*poisoned, mask_BT=mask_BT, initial_state_BHKV=initial, backend=backend)
        for gradient in torch.autograd.grad(out.sum() + final.sum(), poisoned):
            assert gradient.isfinite().all()
            assert not gradient[~mask_BT].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steep_heads_do_not_overflow_over_long_rows(dtype: torch.dtype) -> None:
    T, steep_H = 3000, torch.tensor([-90.0, -1e4, 0.0], requires_grad=True)
    q, k, v = (x.requires_grad_() for x in qkv(T, rows=1, dtype=dtype))
    for mask_BT in (None, torch.arange(T)[None] % 3 > 0):
        out, final = lightning_attention(q, k, v, steep_H, scale=SCALE, mask_BT=mask_BT, initial_state_BHKV=state(1))
        assert out.isfinite().all()
        assert final.isfinite().all()
        for gradient in torch.autograd.grad(out.float().sum() + final.sum(), (q, k, v, steep_H)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [row(name, dtype) for name in ("cpu", "triton") for dtype in (torch.float32, torch.bfloat16)],
)
def test_steep_heads_are_exact(backend: str, dtype: torch.dtype) -> None:
    slopes_H, inputs, initial = torch.tensor([-90.0, -1.5, 0.0]), qkv(200, rows=1, dtype=dtype), state(1)
    options = {"scale": SCALE, "initial_state_BHKV": initial}
    out, final = lightning_attention(*inputs, slopes_H, **options, backend=backend)
    expected_out, expected_final = lightning_attention(*inputs, slopes_H, **options, backend="reference")
    for head in range(H):
        assert_close(out[:, :, head], expected_out[:, :, head])
        assert_close(final[:, head], expected_final[:, head], dtype)


@pytest.mark.parametrize("backend", [row("eager"), row("triton")])
def test_sums_beyond_the_range_of_float16_are_right(backend: str) -> None:
    q, k, v = (torch.full((1, 64, 1, 1), 64.0, dtype=torch.float16) for _ in range(3))
    out, final = lightning_attention(q, k, v, torch.tensor([0.0]), scale=2.0**-12, backend=backend)
    assert final.item() == 64 * 64 * 64
    assert out[0, -1].item() == 64 * 64


@every_backend
def test_the_given_state_is_not_changed(backend: str) -> None:
    for T in (1, 65):
        initial = state()
        copy = initial.clone()
        attend(*qkv(T), initial_state_BHKV=initial, backend=backend)
        assert torch.equal(initial, copy)


@pytest.mark.parametrize("backend", [row("auto"), row("triton")])
@pytest.mark.parametrize("T", [1, 200])
def test_one_graph_holds_the_whole_call(backend: str, T: int) -> None:
    inputs, initial = qkv(T), state()

    def call(q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, initial_state_BHKV=initial, backend=backend)

    # traced and run without code generation: what is tested is that nothing breaks the graph
    traced = torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")
    for actual, expected in zip(traced(*inputs, initial), call(*inputs, initial), strict=True):
        assert_close(actual, expected)


# of the C++


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "value_width"), [(32, 32), (64, 64), (128, 128), (8, 5), (24, 80), (96, 33), (7, 130)]
)
def test_every_level_of_cpu_and_width_agrees_with_the_definition(
    level: str, dtype: torch.dtype, width: int, value_width: int
) -> None:
    for T in (1, 83):
        q, k = torch.randn(2, 1, T, 2, width, dtype=dtype)
        v, initial = torch.randn(1, T, 2, value_width, dtype=dtype), torch.randn(1, 2, width, value_width)
        with at_level(level):
            out, final = attend(q, k, v, initial_state_BHKV=initial, backend="cpu")
        expected_out, expected_final = attend(q, k, v, initial_state_BHKV=initial, backend="reference")
        assert_close(out, expected_out)
        assert_close(final, expected_final, dtype)


@settings(max_examples=150)
@given(
    rows=st.integers(1, 3),
    T=st.integers(1, 200),
    heads=st.integers(1, 9),
    width=st.integers(1, 40),
    value_width=st.integers(1, 70),
    masked=st.booleans(),
    packed=st.booleans(),
    carried=st.booleans(),
    steepest=st.floats(0, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_cpu_agrees_with_eager_whatever_the_call(
    rows: int,
    T: int,
    heads: int,
    width: int,
    value_width: int,
    masked: bool,
    packed: bool,
    carried: bool,
    steepest: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    B = 1 if packed else rows
    q, k = torch.randn(2, B, T, heads, width, dtype=dtype)
    v = torch.randn(B, T, heads, value_width, dtype=dtype)
    slopes_H = -steepest * torch.rand(heads)
    options = {
        "scale": width**-0.5,
        "mask_BT": torch.rand(B, T) > torch.rand(()) if masked else None,
        "cu_seqlens": torch.tensor([0, *torch.randint(0, T + 1, (rows - 1,)).sort()[0], T]) if packed else None,
    }
    initial = torch.randn(rows, heads, width, value_width) if carried else None
    out, final = lightning_attention(q, k, v, slopes_H, **options, initial_state_BHKV=initial, backend="cpu")
    expected_out, expected_final = lightning_attention(
        q.double(),
        k.double(),
        v.double(),
        slopes_H,
        **options,
        initial_state_BHKV=initial.double() if carried else None,
        backend="eager",
    )
    assert_close(out, expected_out.to(dtype))
    assert_close(final, expected_final.float(), dtype)


@pytest.mark.parametrize("T", [1, 130])
def test_cpu_takes_any_strides(T: int) -> None:
    # heads first, a slice of a wider tensor, every second number of a row, one tensor for all heads
    q = torch.randn(B, H, T, K).transpose(1, 2)
    k = torch.randn(B, T, H + 2, 3 * K)[:, :, 1:-1, K : 2 * K]
    v = torch.randn(B, T, H, 2 * V)[..., ::2]
    initial = torch.randn(B, H, V, K).transpose(2, 3)
    mask_BT = (torch.rand(T, B) > 0.3).T
    for inputs in ((q, k, v), (q, k[:, :, :1].expand_as(k), v.flip(1))):
        for mask in (None, mask_BT):
            actual = attend(*inputs, initial_state_BHKV=initial, mask_BT=mask, backend="cpu")
            copies = [x.contiguous() for x in inputs]
            expected = attend(*copies, initial_state_BHKV=initial.contiguous(), mask_BT=mask, backend="cpu")
            assert torch.equal(actual[0], expected[0])
            assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 300])
def test_cpu_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, T: int) -> None:
    q, k, v = torch.randn(3, 2, T, 12, 64, dtype=dtype)
    initial = torch.randn(2, 12, 64, 64)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(attend(q, k, v, initial_state_BHKV=initial, backend="cpu"))
        finally:
            torch.set_num_threads(1)
    for out, final in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(final, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_outputs_too_large_for_a_cache_are_those_of_small_calls(dtype: torch.dtype) -> None:
    # past 8 MiB of outputs and 2 MiB of states other instructions write them
    T = 2**23 // (2 * 128 * dtype.itemsize) + 70
    q, k = torch.randn(2, 1, T, 2, 8, dtype=dtype)
    v = torch.randn(1, T, 2, 128, dtype=dtype)
    whole, final = attend(q, k, v, backend="cpu")
    parts, carried = [], None
    for part in zip(*(x.split(T // 2, dim=1) for x in (q, k, v)), strict=True):
        part_out, carried = attend(*part, initial_state_BHKV=carried, backend="cpu")
        parts.append(part_out)
    assert_close(torch.cat(parts, dim=1), whole)
    assert_close(carried, final, dtype)
    q, k, v = torch.randn(3, 1, 1, 32, 128, dtype=dtype)
    initial = torch.randn(1, 32, 128, 128)
    out, final = attend(q, k, v, initial_state_BHKV=initial, backend="cpu")
    own = slice(7, 8)
    head_out, head_final = lightning_attention(
        q[:, :, own],
        k[:, :, own],
        v[:, :, own],
        log_decay(32)[own],
        scale=SCALE,
        initial_state_BHKV=initial[:, own],
        backend="cpu",
    )
    assert torch.equal(out[:, :, own], head_out)
    assert torch.equal(final[:, own], head_final)


@pytest.mark.parametrize("T", [1, 5])
def test_cpu_takes_heads_without_numbers(T: int) -> None:
    q, v = torch.randn(1, T, 2, 0), torch.randn(1, T, 2, 3)
    out, final = attend(q, q, v, backend="cpu")
    assert out.shape == v.shape
    assert not out.any()
    assert final.shape == (1, 2, 0, 3)
    out, final = attend(v, v, q, backend="cpu")
    assert out.shape == q.shape
    assert final.shape == (1, 2, 3, 0)


def test_cpu_is_an_operator_that_torch_can_reason_about() -> None:
    mask_BT = torch.rand(B, 5) > 0.3
    for options in ((None, None, None), (state(), mask_BT, None)):
        torch.library.opcheck(torch.ops.sala.lightning.default, (*qkv(5), log_decay(H), SCALE, *options))
    packed = (*qkv(5, rows=1), log_decay(H), SCALE, state(2), None, torch.tensor([0, 2, 5]))
    torch.library.opcheck(torch.ops.sala.lightning.default, packed)


def test_cpu_is_chosen_unless_it_cannot_run() -> None:
    q, k, v = qkv(70)
    assert torch.equal(attend(q, k, v)[0], attend(q, k, v, backend="cpu")[0])
    for dtype in (torch.float16, torch.float64):
        other = [x.to(dtype) for x in (q, k, v)]
        assert torch.equal(attend(*other)[0], attend(*other, backend="eager")[0])
        with pytest.raises(BackendError, match=f"{dtype}; it takes float32 and bfloat16"):
            attend(*other, backend="cpu")
    v.requires_grad_()
    assert attend(q, k, v)[0].requires_grad
    with pytest.raises(BackendError, match="no backward pass"):
        attend(q, k, v, backend="cpu")
    with torch.no_grad():
        attend(q, k, v, backend="cpu")


# of the kernels for a GPU


# on a GPU each example is compiled anew: too long for the time of a device
@pytest.mark.skipif(gpu.unavailable() is not None, reason=str(gpu.unavailable()))
@settings(max_examples=8)
@given(
    rows=st.integers(1, 2),
    T=st.integers(1, 160),
    heads=st.integers(1, 2),
    width=st.integers(1, 40),
    value_width=st.integers(1, 70),
    masked=st.booleans(),
    packed=st.booleans(),
    carried=st.booleans(),
    segment=st.sampled_from([64, 128, 1024]),
    steepest=st.floats(0, 100),
    seed=st.integers(0, 2**31),
)
def test_triton_agrees_with_eager_whatever_the_call(
    rows: int,
    T: int,
    heads: int,
    width: int,
    value_width: int,
    masked: bool,
    packed: bool,
    carried: bool,
    segment: int,
    steepest: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    B = 1 if packed else rows
    slopes_H = -steepest * torch.rand(heads) ** 4
    options = {
        "scale": width**-0.5,
        "mask_BT": torch.rand(B, T) > torch.rand(()) if masked else None,
        "cu_seqlens": torch.tensor([0, *torch.randint(0, T + 1, (rows - 1,)).sort()[0], T]) if packed else None,
    }
    shapes = [(B, T, heads, width), (B, T, heads, width), (B, T, heads, value_width), (rows, heads, width, value_width)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes[: 4 if carried else 3]]
    weights = [torch.randn(shape) for shape in shapes[2:]]

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, *initial = [x.to(dtype) for x in inputs]
        states = {"initial_state_BHKV": initial[0]} if carried else {}
        results = lightning_attention(q, k, v, slopes_H, **options, **states, backend=backend)
        total = sum((x * weight).sum() for x, weight in zip(results, weights, strict=True))
        return [x.float() for x in (*results, *torch.autograd.grad(total, inputs))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_module(), "MIN_SEGMENT", segment)
        actual = run("triton", torch.float32)
    for x, expected in zip(actual, run("eager", torch.float64), strict=True):
        assert_close(x, expected)


def triton_module() -> ModuleType:
    return import_module("sala.ops.lightning.triton.scan")


@needs_triton
@pytest.mark.parametrize(("slope", "packed"), [(-1.0, False), (-0.3, True), (0.0, True)])
def test_what_a_head_has_forgotten_is_left_out_and_nothing_else(slope: float, packed: bool, monkeypatch) -> None:
    # segments of several chunks, of which a fast head's states need the last, or the first, alone
    monkeypatch.setattr(triton_module(), "MIN_SEGMENT", 320)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 700, 1, 16))
    options = {"scale": 0.25, "cu_seqlens": torch.tensor([0, 30, 700]) if packed else None}
    results = []
    for backend in ("triton", "eager"):
        out, final = lightning_attention(q, k, v, torch.tensor([slope]), **options, backend=backend)
        results.append([out, final, *torch.autograd.grad((out * v.detach().sin()).sum() + final.sum(), (q, k, v))])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@needs_triton
def test_triton_forgets_only_what_float32_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    # of two segments of 320 tokens; 160 tokens further on e^-80 of a number is left
    monkeypatch.setattr(triton_module(), "MIN_SEGMENT", 320)
    ones, v = torch.ones(1, 640, 1, 1), torch.zeros(1, 640, 1, 1)
    v[0, 160] = 1e30
    out, _ = lightning_attention(ones, ones, v.requires_grad_(), torch.tensor([-0.5]), scale=1.0, backend="triton")
    (gradient,) = torch.autograd.grad(out[0, 479], v, torch.full((1, 1), 1e30))
    left = (1e30 * torch.exp(-0.5 * torch.arange(160, 176, dtype=torch.float64))).float()
    torch.testing.assert_close(out[0, 320:336].flatten(), left, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient[0, 304:320].flatten().flip(0), left, rtol=1e-4, atol=0)


@needs_triton
def test_triton_carries_each_row_of_a_masked_batch_from_segment_to_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_module(), "MIN_SEGMENT", 64)
    test_gradients_agree_with_the_definition("triton", torch.float32, True, 70)


@needs_triton
@pytest.mark.parametrize("T", [1, 70])
def test_triton_cuts_wide_heads_into_tiles(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_module(), "MIN_SEGMENT", 64)
    q, k = torch.randn(2, 1, T, 2, 160)
    inputs, initial = (q, k, torch.randn(1, T, 2, 130)), torch.randn(1, 2, 160, 130)
    results = [attend(*inputs, initial_state_BHKV=initial, backend=backend) for backend in ("triton", "eager")]
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@needs_triton
@pytest.mark.parametrize(("T", "segment"), [(1, 1024), (5, 1024), (130, 1024), (130, 64)])
def test_triton_takes_any_strides(T: int, segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_module(), "MIN_SEGMENT", segment)
    # heads first, a slice of a wider tensor, every second number of a row, one tensor for all heads
    q = torch.randn(B, H, T, K).transpose(1, 2)
    k = torch.randn(B, T, H + 2, 3 * K)[:, :, 1:-1, K : 2 * K]
    v = torch.randn(B, T, H, 2 * V)[..., ::2]
    initial = torch.randn(B, H, V, K).transpose(2, 3)
    mask_BT, slopes_H = (torch.rand(T, B) > 0.3).T, log_decay(2 * H)[::2]
    for inputs in ((q, k, v), (q, k[:, :, :1].expand_as(k), v.flip(1))):
        options = {"scale": SCALE, "initial_state_BHKV": initial, "mask_BT": mask_BT}
        expected = lightning_attention(*inputs, slopes_H, **options, backend="reference")
        for x, y in zip(lightning_attention(*inputs, slopes_H, **options, backend="triton"), expected, strict=True):
            assert_close(x, y)


@needs_triton
def test_triton_makes_the_states_between_segments_once_a_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_module(), "MIN_SEGMENT", 64)
    made, make = [], triton_module().states_between
    monkeypatch.setattr(triton_module(), "states_between", lambda *inputs: made.append(inputs[-1]) or make(*inputs))
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 130, 1, 16)]
    out, _ = lightning_attention(*inputs, log_decay(1), scale=SCALE, backend="triton")
    torch.autograd.grad(out.sum(), inputs)
    assert made == [False, True]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_takes_packed_rows_without_tokens_at_every_seam(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(triton_module(), "MIN_SEGMENT", 64)
    bounds = torch.tensor([0, 0, 30, 64, 64, 129, 130, 130])
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 130, 1, 64, dtype=dtype)]
    inputs.append(torch.randn(7, 1, 64, 64, requires_grad=True))
    results = []
    for backend in ("triton", "eager"):
        *tokens, initial = inputs
        options = {"scale": 0.125, "initial_state_BHKV": initial, "cu_seqlens": bounds}
        out, final = lightning_attention(*tokens, torch.tensor([-0.1]), **options, backend=backend)
        total = (out.float() * inputs[0].detach().sin()).sum() + final.cos().sum()
        results.append((out, final, *torch.autograd.grad(total, inputs)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, dtype)


@needs_triton
@pytest.mark.skipif(GPU, reason="memory that is not there")
@pytest.mark.parametrize("T", [1, 130])
def test_triton_heads_may_lie_further_apart_than_32_bits_reach(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_module(), "MIN_SEGMENT", 64)
    apart, heads = 2**30, 4
    far = memory_for(2 * (heads + 2) * apart)
    tensors = torch.randn(3, 1, T, heads, K, dtype=torch.float16)
    # so that an offset that wraps round stays inside
    spread = [
        far.as_strided((1, T, heads, K), (0, K, apart, 1), apart + i * 2**20).copy_(x) for i, x in enumerate(tensors)
    ]
    results = [lightning_attention(*x, log_decay(heads), scale=SCALE, backend="triton") for x in (spread, tensors)]
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@needs_triton
@pytest.mark.skipif(GPU, reason="memory that is not there")
def test_triton_tokens_may_lie_further_apart_than_32_bits_reach() -> None:
    apart, T = 2**28, 12
    far = memory_for(2 * (T + 9) * apart)
    tensors = torch.randn(3, 1, T, 1, K, dtype=torch.float16)
    # so that an offset that wraps round stays inside
    spread = [
        far.as_strided((1, T, 1, K), (0, apart, 0, 1), 8 * apart + i * 2**20).copy_(x) for i, x in enumerate(tensors)
    ]
    results = [lightning_attention(*x, log_decay(1), scale=SCALE, backend="triton") for x in (spread, tensors)]
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@needs_triton
def test_triton_is_tuned_anew_where_more_segments_fill_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_module(), "MIN_SEGMENT", 64)
    kernel, tuned = triton_module().outputs_kernel, []
    monkeypatch.setattr(kernel, "configs", [*kernel.configs, copy(kernel.configs[-1])])
    monkeypatch.setattr(kernel, "cache", {})
    monkeypatch.setattr(kernel, "prune_configs", lambda options: kernel.configs)
    monkeypatch.setattr(kernel, "_bench", lambda *arguments, **options: tuned.append(options) or [1.0] * 3)
    for T in (130, 140, 200, 130):
        attend(*qkv(T), backend="triton")
    assert len(tuned) == 2 * len(kernel.configs)


@needs_triton
def test_triton_may_be_differentiated_twice() -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 9, 1, 4))
    initial = torch.randn(1, 1, 4, 4, requires_grad=True)
    results = []
    for backend in ("triton", "eager"):
        out, final = attend(q, k, v, initial_state_BHKV=initial, backend=backend)
        first = torch.autograd.grad((out**2).sum() + (final**3).sum(), (q, k, v, initial), create_graph=True)
        results.append(torch.autograd.grad(sum((x**2).sum() for x in first), (q, k, v, initial)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@needs_triton
def test_triton_makes_only_the_gradients_that_are_wanted() -> None:
    (q, k, v), initial = qkv(20), state()
    for wanted in (q, k, v, initial):
        wanted.requires_grad_()
        gradients = []
        for backend in ("triton", "eager"):
            out, final = attend(q, k, v, initial_state_BHKV=initial, backend=backend)
            gradients.append(torch.autograd.grad(final.sum() if wanted is not q else out.sum(), wanted)[0])
        assert_close(*gradients)
        wanted.requires_grad_(False)


@needs_triton
@pytest.mark.parametrize("T", [1, 70])
def test_triton_takes_heads_without_numbers(T: int) -> None:
    q, v = torch.randn(1, T, 2, 0), torch.randn(1, T, 2, 3)
    out, final = attend(q, q, v, backend="triton")
    assert out.shape == v.shape
    assert not out.any()
    assert final.shape == (1, 2, 0, 3)


@needs_triton
def test_triton_is_an_operator_that_torch_can_reason_about() -> None:
    triton_module()
    device = "cuda" if GPU else "cpu"
    mask_BT = torch.rand(1, 20) > 0.3
    for options in ((None, None, None, False), (state(1)[:, :1], mask_BT, torch.tensor([0, 20]), True)):
        inputs = (*(x[:, :, :1] for x in qkv(20, rows=1)), log_decay(1), SCALE, *options)
        inputs = tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)
        for x in inputs[:3]:
            x.requires_grad_()
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.sala.lightning_scan.default, inputs, test_utils=checks)
        _, k, v, *others = inputs
        states = (k.detach(), v.detach(), *others)
        torch.library.opcheck(torch.ops.sala.lightning_states.default, states, test_utils=checks)


@needs_triton
def test_triton_says_what_it_does_not_take() -> None:
    q, k, v = qkv(3)
    with pytest.raises(BackendError, match="torch.float64; it takes float32, bfloat16 and float16"):
        attend(q.double(), k.double(), v.double(), backend="triton")
    wide = torch.randn(1, 1, 1, 257)
    with pytest.raises(BackendError, match="heads are 257 wide; it takes up to 256"):
        attend(wide, wide, wide, backend="triton")
    slopes_H = log_decay(H).requires_grad_()
    with pytest.raises(BackendError, match="gradient of log_decay"):
        lightning_attention(q, k, v, slopes_H, scale=1, backend="triton")
    with torch.no_grad():
        lightning_attention(q, k, v, slopes_H, scale=1, backend="triton")
    if gpu.interpreted():
        with pytest.raises(BackendError, match="interpreter multiplies bfloat16 wrongly"):
            attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="triton")


# what is refused


def change(**changes) -> dict:
    q, k, v = qkv(4)
    return {"q_BTHK": q, "k_BTHK": k, "v_BTHV": v, "log_decay_H": log_decay(H)} | changes


# what no kernel must be given
PACKED = {"cu_seqlens": torch.tensor([0, 9, 4])}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"q_BTHK": torch.zeros(4, H, K)}, r"q and v must be \(B, T, H, width\)"),
        ({"k_BTHK": torch.zeros(B, 4, 1, K)}, r"shape of q, \(2, 4, 3, 8\), not \(2, 4, 1, 8\)"),
        ({"v_BTHV": torch.zeros(B, 5, H, V)}, r"v must be .* not \(2, 5, 3, 5\)"),
        (dict.fromkeys(("q_BTHK", "k_BTHK", "v_BTHV"), torch.zeros(B, 0, H, K)), "at least one token"),
        ({"v_BTHV": torch.zeros(B, 4, H, V).bfloat16()}, r"one dtype of .* not torch.float32, .* torch.bfloat16"),
        (dict.fromkeys(("q_BTHK", "k_BTHK", "v_BTHV"), torch.zeros(B, 4, H, K).int()), "not torch.int32"),
        ({"log_decay_H": log_decay(4)}, r"one value per head, \(3,\), not \(4,\)"),
        ({"log_decay_H": log_decay(H).bfloat16()}, "log_decay must be float32, not torch.bfloat16"),
        ({"log_decay_H": -log_decay(H)}, "not above zero.* pass minus the slope"),
        ({"log_decay_H": torch.full((H,), torch.nan)}, "not nan to nan"),
        ({"log_decay_H": torch.full((H,), -torch.inf)}, "not -inf to -inf"),
        ({"mask_BT": torch.ones(B, 4)}, r"mask must be bool of shape \(2, 4\), not torch.float32"),
        ({"mask_BT": torch.ones(B, 5, dtype=torch.bool)}, r"not torch.bool of shape \(2, 5\)"),
        ({"initial_state_BHKV": torch.zeros(B, H, V, K)}, r"state must be \(2, 3, 8, 5\), not \(2, 3, 5, 8\)"),
        ({"initial_state_BHKV": torch.zeros(B, H, K, V).bfloat16()}, "state must be torch.float32, not torch.bfloat16"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "B must be 1, not 2"),
        ({"cu_seqlens_cpu": torch.tensor([0, 4])}, "cu_seqlens_cpu must be cu_seqlens, None"),
        (PACKED | {"cu_seqlens_cpu": torch.tensor([0, 1, 4])}, r"must be cu_seqlens, \[0, 9, 4\], on the CPU"),
        (PACKED | {"cu_seqlens_cpu": torch.tensor([0, 4])}, r"must be cu_seqlens, \[0, 9, 4\], on the CPU"),
        ({"log_decay_H": torch.zeros(H, device="meta")}, "log_decay on meta, q on cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        lightning_attention(**change(**changes), scale=SCALE)


def test_a_state_must_be_given_per_packed_row() -> None:
    with pytest.raises(InputError, match=r"state must be \(2, 3, 8, 5\), not \(1, 3, 8, 5\)"):
        attend(*qkv(4, rows=1), cu_seqlens=torch.tensor([0, 2, 4]), initial_state_BHKV=state(1))


@every_backend
@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("shape", [(0, 2, 8, 5), (2, 0, 8, 5), (2, 2, 0, 5), (2, 2, 8, 0)], ids=str)
def test_a_call_without_numbers_is_empty(backend: str, T: int, shape: tuple[int, int, int, int]) -> None:
    rows, heads, width, value_width = shape
    q, v = torch.zeros(rows, T, heads, width), torch.ones(rows, T, heads, value_width)
    out, final = lightning_attention(q, q, v, torch.zeros(heads), scale=SCALE, backend=backend)
    assert out.shape == v.shape
    assert not out.any()
    assert final.shape == shape


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="'cuda'; it has auto, cpu, triton, eager, reference"):
        attend(*qkv(4), backend="cuda")


# slots


@every_backend
@pytest.mark.parametrize("T", [1, 7])
def test_states_in_slots_are_states_of_rows(backend: str, T: int) -> None:
    q, k, v = qkv(T, rows=3)
    pool = state(8)
    before = pool.clone()
    # the second row begins; the others change places, and one stays where it is
    slots = torch.tensor([[4, -1, 6], [0, 2, 6]])
    initial = torch.stack([before[4], torch.zeros(H, K, V), before[6]])
    expected, final = attend(q, k, v, initial_state_BHKV=initial, backend=backend)
    out, changed = attend(q, k, v, initial_state_BHKV=pool, slots_2B=slots, backend=backend)
    assert torch.equal(out, expected) and torch.equal(changed[slots[1]], final)
    others = [1, 3, 4, 5, 7]
    assert torch.equal(changed[others], before[others])


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([[0, 1], [2, 8]], "of a pool of 8; expected 0 to 7"),
        ([[-2, 1], [2, 3]], "of a pool of 8; expected 0 to 7"),
        ([[0, 1], [-1, 3]], "of a pool of 8; expected 0 to 7"),
        ([[0], [1]], r"shape \(2, 1\) .* expected int64 of shape \(2, 2\)"),
    ],
)
def test_slots_that_a_pool_has_not_are_refused(slots: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attend(*qkv(1), initial_state_BHKV=state(8), slots_2B=torch.tensor(slots))
