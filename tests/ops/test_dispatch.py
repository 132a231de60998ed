"""Laws of the choice of a backend."""

import sys

import pytest
import torch
from torch import Tensor

from absent_card import CARD, choose_for_card
from sala.errors import BackendError
from sala.ops import dispatch, gpu
from sala.ops.dispatch import BACKENDS, choose, explain, unavailable

EAGER = BACKENDS["lightning"]["eager"].reason


@pytest.mark.parametrize("op", BACKENDS)
def test_the_definition_is_never_chosen_for_the_user(op: str) -> None:
    name, reason = explain(op)
    assert name == ("cpu" if unavailable(op, "cpu") is None else "eager")
    assert reason
    assert choose(op).__name__ == f"sala.ops.{op}.{name}"
    assert BACKENDS[op]["reference"].devices == ()


def test_kernels_for_a_gpu_are_chosen_on_a_gpu_and_missed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(gpu, "_unavailable", lambda interpreted: "torch sees no GPU")
    assert explain("lightning", "cuda") == ("eager", f"{EAGER}; triton cannot run here: torch sees no GPU")
    assert "triton" not in explain("lightning")[1]
    with pytest.raises(BackendError, match="'triton' cannot run: torch sees no GPU"):
        choose("lightning", "triton")
    monkeypatch.setattr(gpu, "_unavailable", lambda interpreted: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert explain("lightning", "cuda") == ("triton", "kernels for GPUs; Triton on a card")
    with pytest.raises(BackendError, match="a tensor is on cpu; it runs on cuda"):
        choose("lightning", "triton", (torch.zeros(1, 1, 1, 1),) * 4)


@pytest.fixture
def with_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    if gpu.unavailable() is not None:
        pytest.skip("Triton is not installed")
    choose_for_card(monkeypatch)
    dispatch._say.cache_clear()


def on_card(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CARD)


def heads(H: int, G: int, K: int, dtype: torch.dtype = torch.float16, B: int = 1) -> tuple[Tensor, ...]:
    """Return queries, keys, values, compressed keys of both tiers, and positions."""
    keys = [on_card(B, 9, G, K, dtype=dtype) for _ in range(4)]
    return on_card(B, 3, H, K, dtype=dtype), *keys, torch.zeros(B, 3, dtype=torch.int32, device=CARD)


@pytest.mark.parametrize(
    ("op", "fits", "exceeds", "why"),
    [
        ("infllm", heads(64, 1, 128), heads(65, 1, 128), "65 heads share a key of 128 numbers; it takes up to 64"),
        ("infllm", heads(64, 2, 192), heads(66, 2, 192), "33 heads share a key of 192 numbers; it takes up to 32"),
        (
            *("infllm", heads(16, 1, 256, torch.float32), heads(17, 1, 256, torch.float32)),
            "17 heads share a key of 256 numbers; it takes up to 16",
        ),
        ("infllm", heads(2, 1, 256), heads(2, 1, 257), "heads are 257 wide; it takes up to 256"),
        (
            "infllm",
            heads(1, 1, 1, B=65535),
            heads(2, 2, 1, B=32768),
            "rows and groups are 32768 x 2; it takes up to 65,535",
        ),
        ("infllm", (on_card(65535, 9, 1, 8),), (on_card(65536, 9, 1, 8),), "it takes up to 65,535"),
        (
            *("lightning", (on_card(1, 3, 2, 256),) * 3 + (on_card(2),), (on_card(1, 3, 2, 300),) * 3 + (on_card(2),)),
            "heads are 300 wide; it takes up to 256",
        ),
        (
            "lightning",
            (on_card(1, 3, 2, 64),) * 3 + (on_card(300),),
            (on_card(1, 3, 2, 257),) * 3 + (on_card(2),),
            "257 wide",
        ),
        ("pointwise", (on_card(1, 2, 32768),), (on_card(1, 2, 32769),), "rows are 32769 wide; it takes up to 32768"),
    ],
)
def test_what_passes_a_limit_of_the_kernels_runs_through_plain_torch_with_one_line(
    with_a_card: None,
    caplog: pytest.LogCaptureFixture,
    op: str,
    fits: tuple[Tensor, ...],
    exceeds: tuple[Tensor, ...],
    why: str,
) -> None:
    assert choose(op, tensors=fits).__name__ == f"sala.ops.{op}.triton"
    assert not caplog.records
    for _ in range(2):
        assert choose(op, tensors=exceeds).__name__ == f"sala.ops.{op}.eager"
    (record,) = caplog.records
    assert record.message.startswith(f"{op}: backend 'triton' is not used: ") and why in record.message
    with pytest.raises(BackendError, match=why):
        choose(op, "triton", exceeds)


def test_what_the_kernels_never_take_is_passed_over_without_a_line(
    with_a_card: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose("infllm", tensors=heads(2, 1, 8, torch.float64)).__name__ == "sala.ops.infllm.eager"
    wanted = on_card(1, 2, 8).requires_grad_()
    assert choose("pointwise", tensors=(wanted,)).__name__ == "sala.ops.pointwise.eager"
    assert not caplog.records


def test_torch_compile_sees_through_a_limit(with_a_card: None) -> None:
    def call(x: Tensor) -> Tensor:
        return x + (choose("infllm", tensors=(x, x[:, :, :1])).__name__ == "sala.ops.infllm.eager")

    assert torch.compile(call, fullgraph=True, backend="eager")(on_card(1, 1, 65, 128)).shape == (1, 1, 65, 128)


def test_torch_compile_sees_through_a_choice_a_choice_that_has_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    choose("lightning", "reference")
    monkeypatch.delitem(sys.modules, "sala.ops.lightning.reference")

    def call(x: Tensor) -> Tensor:
        # what is chosen first needs no import
        x = choose("pointwise", "eager").rms_norm(x, x, 1e-6)
        assert choose("lightning", "reference").__name__ == "sala.ops.lightning.reference"
        return x + 1

    assert torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(1)).item() == 1


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in BACKENDS for name in BACKENDS[op] if unavailable(op, name) is None]
)
def test_a_name_runs_the_file_of_that_name(op: str, name: str) -> None:
    assert choose(op, name).__name__ == f"sala.ops.{op}.{name}"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        BackendError, match=r"'eagr'; it has auto, cpu, triton, eager, reference; did you mean 'eager'\?"
    ):
        choose("lightning", "eagr")
