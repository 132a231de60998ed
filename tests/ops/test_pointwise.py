"""Laws of the elementwise work: every backend against the definition, and rounded where plain torch rounds."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sala.errors import BackendError, InputError
from sala.ops import native, pointwise
from sala.ops.dispatch import BACKENDS, unavailable
from sala.ops.pointwise import add_rms_norm, add_scaled, norm_gate, norm_rotate, rms_norm, silu_mul
from tolerances import assert_close

every_other_backend = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS["pointwise"] if name != "reference"]
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
every_level = pytest.mark.parametrize("level", native.levels_here())
with_cpu = pytest.mark.skipif(unavailable("pointwise", "cpu") is not None, reason="no C++ here")

EPS = 1e-6
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
    every: dict[str, Call] = {
        "rms_norm": lambda backend: rms_norm(x, weight, EPS, backend=backend),
        "add_scaled": lambda backend: add_scaled(x, branch, 0.35, backend=backend),
        "add_rms_norm": lambda backend: add_rms_norm(x, branch, 0.35, weight, EPS, backend=backend),
        "silu_mul": lambda backend: silu_mul(x * 8, branch, backend=backend),
    }
    widths = {0, K // 2, K // 4}
    for norm, R, rows, scaled in product((None, (head_weight, EPS)), sorted(widths), {1, B}, (False, True)):
        options = {
            "norm": norm,
            "scale_BT": scale_BT if scaled else None,
            "rotation": tables(rows, T, R) if R else None,
        }
        every[f"norm_rotate {norm is not None} {R} {rows} {scaled}"] = lambda backend, options=options: norm_rotate(
            heads, **options, backend=backend
        )
    for norm, gated, x_BTHV in product((None, (weight, EPS)), (False, True), (heads, tokens_of_a_head_together)):
        options = {"norm": norm, "gate_BTD": gate if gated else None}
        every[f"norm_gate {norm is not None} {gated} {x_BTHV.stride()}"] = (
            lambda backend, options=options, x_BTHV=x_BTHV: norm_gate(x_BTHV, **options, backend=backend)
        )
    return every


def flat(result: Tensor | tuple[Tensor, Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


# against the definition


@every_other_backend
@every_dtype
@pytest.mark.parametrize("size", [(1, 1, 4, 64), (2, 5, 3, 24), (1, 130, 2, 20), (2, 63, 5, 8)], ids=str)
def test_backends_agree_with_the_definition(backend: str, dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    for name, call in calls(*size, dtype).items():
        for actual, expected in zip(flat(call(backend)), flat(call("reference")), strict=True):
            try:
                assert_close(actual, expected)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


@with_cpu
@every_level
@every_dtype
@pytest.mark.parametrize("size", [(2, 7, 3, 32), (1, 3, 2, 20), (1, 2, 5, 96)], ids=str)
def test_every_level_rounds_where_plain_torch_does(
    level: str, dtype: torch.dtype, size: tuple[int, int, int, int]
) -> None:
    """Within one rounding of the result's own dtype: a rounding left out or made twice is seen in bfloat16."""
    bound = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    with native.at_level(level):
        for name, call in calls(*size, dtype).items():
            for actual, expected in zip(flat(call("cpu")), flat(call("eager")), strict=True):
                largest = expected.abs().max()
                off = (
                    (actual.float() - expected.float()).abs() > bound * expected.float().abs() + 1e-7 * largest
                ).sum()
                assert actual.dtype == dtype and off == 0, name
                if dtype == torch.bfloat16:
                    assert (actual != expected).float().mean() < 0.01, f"{name}: roundings differ beyond the rare tie"


@with_cpu
@settings(max_examples=60, deadline=None)
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


@with_cpu
def test_extremes_are_those_of_plain_torch() -> None:
    x = torch.tensor([-torch.inf, -1e4, -100.0, -88.5, -80.0, 0.0, 80.0, 88.5, 100.0, 1e4, torch.nan])
    one = torch.ones_like(x)
    torch.testing.assert_close(
        silu_mul(x[1:], one[1:], backend="cpu"), silu_mul(x[1:], one[1:], backend="eager"), equal_nan=True
    )
    gates = {"gate_BTD": x[None, None]}
    torch.testing.assert_close(
        norm_gate(one[None, None, None], **gates, backend="cpu"),
        norm_gate(one[None, None, None], **gates, backend="eager"),
        equal_nan=True,
    )
    nan = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    assert torch.equal(
        rms_norm(nan, torch.ones(2), EPS, backend="cpu").isnan(), torch.tensor([[True, True], [False, False]])
    )


@with_cpu
def test_no_tokens_are_no_work() -> None:
    nothing = torch.randn(1, 0, 32)
    assert rms_norm(nothing, torch.ones(32), EPS, backend="cpu").shape == (1, 0, 32)
    assert norm_gate(nothing.view(1, 0, 4, 8), gate_BTD=nothing, backend="cpu").shape == (1, 0, 32)
    assert norm_rotate(nothing.view(1, 0, 4, 8), rotation=tables(1, 0, 4), backend="cpu").shape == (1, 0, 4, 8)


# properties of the functions


@every_other_backend
def test_a_rotation_keeps_lengths_and_depends_on_distance_alone(backend: str) -> None:
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 50, 1, 16)
    angles = torch.arange(50.0)[None, :, None] * torch.rand(8)
    options = {"rotation": (angles.cos(), angles.sin()), "backend": backend}
    turned_q, turned_k = norm_rotate(q, **options), norm_rotate(k, **options)
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


@with_cpu
def test_what_the_library_does_not_take_is_refused_by_name() -> None:
    x = torch.randn(1, 3, 8)
    with pytest.raises(BackendError, match="float64"):
        silu_mul(x.double(), x.double(), backend="cpu")
    with pytest.raises(BackendError, match="one dtype"):
        rms_norm(x.bfloat16(), torch.ones(8), EPS, backend="cpu")
    with pytest.raises(BackendError, match="gradient"):
        rms_norm(x.requires_grad_(), torch.ones(8), EPS, backend="cpu")


@with_cpu
def test_torch_sees_operators() -> None:
    """Shapes, strides and dtypes of the fake versions are those of the real ones; a compiled function gives the same."""
    x, gate = torch.randn(2, 1, 5, 4, 8)
    cosine, sine = tables(1, 5, 4)
    ops = torch.ops.sala
    for op, arguments in (
        (ops.rms_norm, (x, torch.ones(8), EPS)),
        (ops.add_scaled, (x, gate, 0.5)),
        (ops.add_rms_norm, (x, gate, 0.5, torch.ones(8), EPS)),
        (ops.norm_rotate, (x, torch.ones(8), EPS, cosine, sine, torch.ones(1, 5))),
        (ops.norm_gate, (x, torch.ones(32), EPS, gate.flatten(2))),
        (ops.silu_mul, (x, gate)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))

    def layer(x: Tensor) -> Tensor:
        heads = norm_rotate(x, norm=(torch.ones(8), EPS), rotation=(cosine, sine))
        return add_scaled(silu_mul(norm_gate(heads), gate.flatten(2)), gate.flatten(2), 0.5)

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
    ],
)
def test_inputs_that_do_not_fit_are_refused(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises((InputError, BackendError), match=message):
        call(torch.randn(2, 3, 8))


def test_the_public_functions_are_the_ones_tested() -> None:
    assert set(pointwise.__all__) == {name.split()[0] for name in calls(1, 1, 2, 8, torch.float32)}
