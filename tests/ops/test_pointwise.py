"""Laws of the elementwise work: every backend against the definition, and rounded where plain torch rounds."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import levels
from devices import GPU, on_device_of, row
from sala.errors import BackendError, InputError
from sala.ops import gpu, native, pointwise
from sala.ops.dispatch import BACKENDS, choose, unavailable
from sala.ops.pointwise import add_rms_norm, add_scaled, norm_gate, norm_rotate, rms_norm, silu_mul
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16)
DTYPES_OF = {"triton": (*DTYPES, torch.float16)}
OTHERS = [name for name in BACKENDS["pointwise"] if name != "reference"]

every_other_backend = pytest.mark.parametrize("backend", [row(name) for name in OTHERS])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
every_dtype_of_triton = pytest.mark.parametrize(
    ("backend", "dtype"), [row("triton", dtype) for dtype in DTYPES_OF["triton"]]
)
every_fast_backend = pytest.mark.parametrize(
    "backend", [row(name) for name in ("cpu", "triton") if unavailable("pointwise", name) is None]
)
every_level = pytest.mark.parametrize("level", levels.TESTED)
with_cpu = pytest.mark.skipif(unavailable("pointwise", "cpu") is not None, reason="no C++ here")

# large enough that a result without it is another
EPS = 0.1
Call = Callable[[str], Tensor | tuple[Tensor, Tensor]]


def tables(rows: int, T: int, R: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(rows, T, R) * 1000
    return angles.cos(), angles.sin()


def calls(B: int, T: int, H: int, K: int, dtype: torch.dtype) -> dict[str, Call]:
    """Every function with every switch, on inputs of one size."""
    D = H * K
    x, branch, gate = torch.randn(3, B, T, D).to(dtype)
    heads = x.view(B, T, H, K)
    tokens_of_a_head_together = heads.transpose(1, 2).contiguous().transpose(1, 2)
    weight, head_weight = (1 + 0.3 * torch.randn(D)).to(dtype), (1 + 0.3 * torch.randn(K)).to(dtype)
    scale_BT = torch.rand(B, T) + 1
    every: dict[str, Call] = {}

    def add(name: str, function: Callable[..., Tensor | tuple[Tensor, Tensor]], *arguments: object, **options: object):
        every[name] = lambda backend: on_device_of(backend, function, *arguments, **options)

    add("rms_norm", rms_norm, x, weight, EPS)
    add("add_scaled", add_scaled, x, branch, 0.35)
    add("add_rms_norm", add_rms_norm, x, branch, 0.35, weight, EPS)
    add("silu_mul", silu_mul, x * 8, branch)
    widths = {0, K // 2, K // 4}
    for norm, R, rows, scaled in product((None, (head_weight, EPS)), sorted(widths), {1, B}, (False, True)):
        rotation = tables(rows, T, R) if R else None
        add(
            f"norm_rotate {norm is not None} {R} {rows} {scaled}", norm_rotate, heads,
            norm=norm, scale_BT=scale_BT if scaled else None, rotation=rotation,
        )  # fmt: skip
    for norm, gated, x_BTHV in product((None, (weight, EPS)), (False, True), (heads, tokens_of_a_head_together)):
        gate_BTD = gate if gated else None
        add(f"norm_gate {norm is not None} {gated} {x_BTHV.stride()}", norm_gate, x_BTHV, norm=norm, gate_BTD=gate_BTD)
    return every


def flat(result: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


# against the definition


# the interpreter takes a millisecond a program, and a token is one
SIZES = [(1, 1, 4, 64), (2, 2, 3, 24), (1, 1, 17, 128), (1, 130, 2, 20), (2, 63, 5, 8)]
SIZES_OF = {"triton": SIZES if GPU else SIZES[:3]}


@pytest.mark.parametrize(
    ("backend", "dtype", "size"),
    [
        row(name, dtype, size)
        for name in OTHERS
        for dtype in DTYPES_OF.get(name, DTYPES)
        for size in SIZES_OF.get(name, SIZES)
    ],
)
def test_backends_agree_with_the_definition(backend: str, dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    for name, call in calls(*size, dtype).items():
        for actual, expected in zip(flat(call(backend)), flat(call("reference")), strict=True):
            try:
                assert_close(actual, expected)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


def assert_rounded_as_plain_torch(backend: str, dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    """Within one rounding of the result's own dtype: a rounding left out or made twice is seen in 16 bits."""
    bound = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for name, call in calls(*size, dtype).items():
        for actual, expected in zip(flat(call(backend)), flat(call("eager")), strict=True):
            largest = expected.abs().max()
            off = ((actual.float() - expected.float()).abs() > bound * expected.float().abs() + 1e-7 * largest).sum()
            assert actual.dtype == dtype and off == 0, name
            if dtype != torch.float32:
                assert (actual != expected).float().mean() < 0.01, f"{name}: roundings differ beyond the rare tie"


@with_cpu
@every_level
@every_dtype
@pytest.mark.parametrize("size", [(2, 7, 3, 32), (1, 3, 2, 20), (1, 2, 5, 96)], ids=str)
def test_every_level_rounds_where_plain_torch_does(
    level: str, dtype: torch.dtype, size: tuple[int, int, int, int]
) -> None:
    with native.at_level(level):
        assert_rounded_as_plain_torch("cpu", dtype, size)


@every_dtype_of_triton
def test_triton_rounds_where_plain_torch_does(backend: str, dtype: torch.dtype) -> None:
    assert_rounded_as_plain_torch(backend, dtype, (1, 2, 5, 96))


@with_cpu
@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_and_stride(data: st.DataObject) -> None:
    B, T, H = (data.draw(st.integers(1, 3)) for _ in range(3))
    K = 2 * data.draw(st.integers(1, 40))
    R = data.draw(st.integers(1, K // 2))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    layout = data.draw(st.permutations([0, 1, 2]))
    padded = torch.randn(*[(B, T, H)[i] for i in layout], K + data.draw(st.integers(0, 3)))
    every_second = data.draw(st.booleans())
    x_BTHK = padded[..., :K].permute(*[layout.index(i) for i in range(3)], 3)
    if every_second:
        x_BTHK = torch.randn(B, T, H, 2 * K)[..., ::2]
    options = {"norm": (torch.rand(2 * K)[::2], EPS), "rotation": tables(1, T, R)}
    assert_close(norm_rotate(x_BTHK, **options, backend="cpu"), norm_rotate(x_BTHK, **options, backend="reference"))
    gate = torch.randn(T, B, H * K).transpose(0, 1)
    options = {"norm": (torch.rand(H * K), EPS), "gate_BTD": gate}
    assert_close(norm_gate(x_BTHK, **options, backend="cpu"), norm_gate(x_BTHK, **options, backend="reference"))
    wide = torch.randn(B, T, K + 5)[..., :K]
    other = gate[..., :K]
    assert_close(silu_mul(wide, other, backend="cpu"), silu_mul(wide, other, backend="reference"))
    assert_close(add_scaled(wide, other, 0.5, backend="cpu"), add_scaled(wide, other, 0.5, backend="reference"))
    assert_close(
        rms_norm(other, torch.ones(K), EPS, backend="cpu"), rms_norm(other, torch.ones(K), EPS, backend="eager")
    )


@with_cpu
@every_dtype
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        try:
            # large enough to be shared
            results.append([out for call in calls(1, 300, 4, 64, dtype).values() for out in flat(call("cpu"))])
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens of a head together": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a wider tensor": lambda x: torch.cat((x, x), 2)[:, :, : x.shape[2]],
    "every second number": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "rows turned round": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@every_fast_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_changes_a_number(backend: str, layout: str) -> None:
    heads, weight = torch.randn(2, 3, 2, 12), torch.rand(24)
    x, other = torch.randn(2, 2, 3, 24)

    def lying(y: Tensor) -> Tensor:
        return LAYOUTS[layout](y) if y.ndim > 1 else y.repeat_interleave(2)[::2]

    for function, tensors, options in (
        (rms_norm, (x, weight, EPS), {}),
        (add_rms_norm, (x, other, 0.5, weight, EPS), {}),
        (add_scaled, (x, other, 0.5), {}),
        (silu_mul, (x, other), {}),
        (norm_rotate, (heads,), {"norm": (weight[:12], EPS), "rotation": tables(1, 3, 4)}),
        (norm_gate, (heads,), {"norm": (weight, EPS), "gate_BTD": other}),
    ):
        expected = flat(on_device_of(backend, function, *tensors, **options))
        tensors, options = tree_map_only(Tensor, lying, (tensors, options))
        for actual, plain in zip(flat(on_device_of(backend, function, *tensors, **options)), expected, strict=True):
            assert torch.equal(actual, plain), function.__name__


@every_fast_backend
def test_extremes_are_those_of_plain_torch(backend: str) -> None:
    def assert_plain(function: Callable[..., Tensor], *arguments: Tensor, **options: Tensor) -> None:
        # the interpreter's exponentials warn
        with np.errstate(all="ignore"):
            actual = on_device_of(backend, function, *arguments, **options)
        torch.testing.assert_close(actual, function(*arguments, **options, backend="eager"), equal_nan=True)

    x = torch.tensor([-torch.inf, -1e4, -100.0, -88.5, -80.0, 0.0, 80.0, 88.5, 100.0, 1e4, torch.nan])
    one = torch.ones_like(x)
    assert_plain(silu_mul, x[1:], one[1:])
    assert_plain(norm_gate, one[None, None, None], gate_BTD=x[None, None])
    nan = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    normed = on_device_of(backend, rms_norm, nan, torch.ones(2), EPS)
    assert torch.equal(normed.isnan(), torch.tensor([[True, True], [False, False]]))


@every_fast_backend
def test_no_tokens_are_no_work(backend: str) -> None:
    nothing = torch.randn(1, 0, 32)
    heads = nothing.view(1, 0, 4, 8)
    assert on_device_of(backend, rms_norm, nothing, torch.ones(32), EPS).shape == (1, 0, 32)
    assert on_device_of(backend, silu_mul, nothing, nothing).shape == (1, 0, 32)
    assert on_device_of(backend, norm_gate, heads, gate_BTD=nothing).shape == (1, 0, 32)
    assert on_device_of(backend, norm_rotate, heads, rotation=tables(1, 0, 4)).shape == (1, 0, 4, 8)


# properties of the functions


@every_other_backend
def test_a_rotation_keeps_lengths_and_depends_on_distance_alone(backend: str) -> None:
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 20, 1, 16)
    angles = torch.arange(20.0)[None, :, None] * torch.rand(8)
    options = {"rotation": (angles.cos(), angles.sin())}
    turned_q, turned_k = (on_device_of(backend, norm_rotate, x, **options) for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    products = (turned_q[0, 7:, 0] * turned_k[0, :-7, 0]).sum(-1)
    torch.testing.assert_close(products, products[:1].expand_as(products), atol=1e-4, rtol=1e-4)


def test_nothing_to_do_changes_nothing() -> None:
    x = torch.randn(1, 3, 2, 8)
    assert norm_rotate(x) is x


def test_gradients_run_in_plain_torch() -> None:
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(8, dtype=torch.float64, requires_grad=True)
    turn = tables(1, 3, 4)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        turned = norm_rotate(x, norm=(weight, EPS), rotation=turn)
        total, normed = add_rms_norm(x, turned, 0.5, weight, EPS)
        return add_scaled(silu_mul(normed, total), turned, 0.5).sum()

    single = [tensor.detach().float().requires_grad_() for tensor in (x, weight)]
    gradients = torch.autograd.grad(layer(*single), single)
    for gradient, expected in zip(gradients, torch.autograd.grad(layer(x, weight), (x, weight)), strict=True):
        assert_close(gradient, expected.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_run_in_plain_torch(dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 8).to(dtype)
    assert torch.equal(silu_mul(x, x), silu_mul(x, x, backend="eager"))
    # as promoted there: norms kept in float32 beside a model in bfloat16
    assert rms_norm(x.bfloat16(), torch.ones(8), EPS).dtype == torch.float32


@every_fast_backend
def test_what_a_backend_does_not_take_is_refused_by_name(backend: str) -> None:
    x = torch.randn(1, 3, 8)
    with pytest.raises(BackendError, match="float64"):
        on_device_of(backend, silu_mul, x.double(), x.double())
    with pytest.raises(BackendError, match="one dtype"):
        on_device_of(backend, rms_norm, x.half(), torch.ones(8), EPS)
    with pytest.raises(BackendError, match="gradient"):
        on_device_of(backend, rms_norm, x.requires_grad_(), torch.ones(8), EPS)
    if backend == "triton":
        with pytest.raises(BackendError, match="rows are 40000 wide; it takes up to 32768"):
            on_device_of(backend, silu_mul, *torch.randn(2, 1, 1, 40000))


def test_on_a_gpu_kernels_run_unless_a_gradient_is_wanted_or_a_compiler_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(gpu, "_unavailable", lambda interpreted: None)
    with FakeTensorMode():
        x = torch.empty(1, 3, 8, device="cuda:0")
        wanted = torch.empty(1, 3, 8, device="cuda:0", requires_grad=True)
    assert choose("pointwise", tensors=(x, x)).__name__ == "sala.ops.pointwise.triton"
    assert choose("pointwise", tensors=(x, wanted)).__name__ == "sala.ops.pointwise.eager"
    with torch.no_grad():
        assert choose("pointwise", tensors=(x, wanted)).__name__ == "sala.ops.pointwise.triton"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose("pointwise", tensors=(x, x)).__name__ == "sala.ops.pointwise.eager"
    assert choose("pointwise", "triton", (x, x)).__name__ == "sala.ops.pointwise.triton"


@every_fast_backend
def test_torch_sees_operators(backend: str) -> None:
    """Shapes, strides and dtypes of the fake versions are those of the real ones; a compiled function gives the same."""
    device = "cuda" if GPU and backend == "triton" else "cpu"
    x, gate = torch.randn(2, 1, 5, 4, 8, device=device)
    weight_K, weight_D, scale_BT = (torch.ones(*shape, device=device) for shape in ((8,), (32,), (1, 5)))
    cosine, sine = (table.to(device) for table in tables(1, 5, 4))
    choose("pointwise", backend)
    prefix = "pointwise_triton_" if backend == "triton" else ""
    for name, arguments in (
        ("rms_norm", (x, weight_K, EPS)),
        ("add_scaled", (x, gate, 0.5)),
        ("add_rms_norm", (x, gate, 0.5, weight_K, EPS)),
        ("norm_rotate", (x, weight_K, EPS, cosine, sine, scale_BT)),
        ("norm_gate", (x, weight_D, EPS, gate.flatten(2))),
        ("silu_mul", (x, gate)),
    ):
        op = getattr(torch.ops.sala, prefix + name).default
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))

    def layer(x: Tensor) -> Tensor:
        heads = norm_rotate(x, norm=(weight_K, EPS), rotation=(cosine, sine), backend=backend)
        gated = silu_mul(norm_gate(heads, backend=backend), gate.flatten(2), backend=backend)
        return add_scaled(gated, gate.flatten(2), 0.5, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


# refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x, torch.ones(7), EPS), r"must be \(8,\), not \(7,\)"),
        (lambda x: add_scaled(x, x[:, :1], 1.0), "one shape"),
        (lambda x: silu_mul(x, x[..., :4]), "one shape"),
        (lambda x: add_rms_norm(x, x, 1.0, torch.ones(9), EPS), r"not \(9,\)"),
        (lambda x: norm_rotate(x), r"heads must be \(B, T, H, K\)"),
        (lambda x: norm_rotate(x[None], rotation=tables(1, 2, 5)), "2 R at most the head width 8"),
        (lambda x: norm_rotate(x[None], rotation=tables(1, 3, 4)), r"cosine must be float32.*\(1, 2\)"),
        (lambda x: norm_rotate(x[None], scale_BT=torch.ones(1, 2).double()), "scale must be float32"),
        (lambda x: norm_gate(x[None], gate_BTD=x), r"gate must be \(1, 2, 24\)"),
        (lambda x: rms_norm(x, torch.ones(8), EPS, backend="cpus"), "did you mean 'cpu'"),
        (lambda x: rms_norm(x.int(), torch.ones(8).int(), EPS), "one of float32, .* not torch.int32"),
        (lambda x: silu_mul(x.int(), x.int()), "one of float32, .* not torch.int32"),
        (lambda x: norm_gate(x[None].int(), gate_BTD=x[None].flatten(2).int()), "not torch.int32"),
        (lambda x: norm_rotate(x[None].int(), scale_BT=torch.ones(1, 2)), "not torch.int32"),
        (lambda x: add_rms_norm(x, x, 1.0, torch.ones(8, device="meta"), EPS), "weight on meta, x on cpu"),
        (lambda x: add_scaled(x, x.to("meta"), 1.0), "on meta, x on cpu"),
        (
            lambda x: norm_rotate(x[None], rotation=(torch.ones(1, 2, 4, device="meta"),) * 2),
            "cosine on meta, x on cpu",
        ),
        (lambda x: norm_rotate(x[None], scale_BT=torch.ones(1, 2, device="meta")), "scale on meta, x on cpu"),
        (lambda x: norm_gate(x[None], gate_BTD=x[None].flatten(2).to("meta")), "gate on meta, x on cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises((InputError, BackendError), match=message):
        call(torch.randn(2, 3, 8))


def test_the_public_functions_are_the_ones_tested() -> None:
    assert set(pointwise.__all__) == {name.split()[0] for name in calls(1, 1, 2, 8, torch.float32)}
