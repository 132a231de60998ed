"""A tiny hybrid with the embedded tokenizer, as one checkpoint folder; and what stands for a GPU where there is none."""

from collections.abc import Callable, Iterator
from importlib import import_module

import pytest
import torch

from model.shapes import tiny_model
from sala.data import load_tokenizer
from sala.model.checkpoint import find_checkpoint
from sala.ops import gpu


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(find_checkpoint("embedded-teacher"))


@pytest.fixture(scope="session")
def model(tokenizer):
    return tiny_model(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def on_meta(chosen_on: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let tensors without numbers stand for a GPU's: kernels are not run, but written down with all that they are given."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are not interpreted beside a GPU")
    kernels: list[str] = []

    def run(kernel, *arguments, grid, warmup, **options):
        shown = [(tuple(x.shape), x.stride()) if isinstance(x, torch.Tensor) else x for x in arguments]
        kernels.append(f"{kernel.__name__} {grid} {shown} {options}")

    chosen_on("meta", "lightning", "pointwise")
    chosen_on("meta", "infllm", refuses=lambda tensors: None)
    monkeypatch.setattr("triton.runtime.interpreter.InterpretedFunction.run", run)
    monkeypatch.setattr("triton.runtime.autotuner.Autotuner.run", lambda self, *arguments, **options: None)
    monkeypatch.setattr(gpu, "refuses", lambda tensors: None)
    # torch's flash attention keeps an output, and a number a row
    eager = import_module("sala.ops.dense.eager")
    monkeypatch.setattr(eager, "_runs_flash_attention", lambda q, k, v: True)
    monkeypatch.setattr(eager, "causal_lower_right", lambda rows, columns: None)
    monkeypatch.setattr(
        eager, "scaled_dot_product_attention", lambda q, k, v, **options: q.new_empty(*q.shape[:3], v.shape[3])
    )
    # what an operator asks of torch is seen too
    monkeypatch.setattr(gpu, "watched", lambda: False)
    yield kernels
