"""Laws of the choice of a backend."""

import sys

import pytest
import torch
from torch import Tensor

from sala.errors import BackendError
from sala.ops import gpu
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


def test_torch_compile_sees_through_a_choice_that_has_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
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
