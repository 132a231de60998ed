"""torch.compile takes the model whole: one graph, in which an operator is one step."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from absent_card import CARD, choose_for_card
from model.shapes import tiny_config, tiny_model, tokens
from sala.model import MiniCPMSALAForCausalLM, new_cache
from sala.ops.dispatch import unavailable

LAYERS = {"num_hidden_layers": 2, "mixer_types": ["minicpm4", "lightning-attn"]}
# blocks are chosen from position 64 on
LENGTH = 100


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    torch._dynamo.reset()


def compiled(model: MiniCPMSALAForCausalLM, backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, dynamic=False, backend=counter), counter


def operators(counter: CompileCounterWithBackend) -> list[str]:
    """The library's operators in the one graph, in order."""
    (graph,) = counter.graphs
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in names if name.startswith("sala.") and name != "sala.constant.default"]


@pytest.mark.skipif(unavailable("infllm", "cpu") is not None, reason="no C++ here")
@torch.no_grad()
def test_a_prefill_is_one_graph() -> None:
    model, ids = tiny_model(**LAYERS), tokens(2, LENGTH)
    whole, counter = compiled(model)
    options = {"use_cache": False, "logits_to_keep": 1}
    assert torch.equal(whole(ids, **options).logits, model(ids, **options).logits)
    attention = [name for name in operators(counter) if name in ("infllm_select", "attend_blocks", "lightning")]
    assert attention == ["infllm_select", "attend_blocks", "lightning"]


def test_a_training_step_is_one_graph() -> None:
    model, ids = tiny_model(**LAYERS).train(), tokens(2, 40)
    whole, counter = compiled(model, "eager")
    gradients = []
    for forward in (whole, model):
        forward(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad(set_to_none=True)
    assert counter.frame_count == 1
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_on_a_gpu_kernels_are_steps_of_one_graph_and_the_rest_is_for_the_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose_for_card(monkeypatch)
    with CARD:
        model = MiniCPMSALAForCausalLM(tiny_config(**LAYERS)).train()
    whole, counter = compiled(model)
    whole(torch.empty(2, LENGTH, dtype=torch.long, device=CARD), use_cache=False).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    compression = ["infllm_triton_compress"] * 2
    assert operators(counter) == [*compression, "infllm_triton_attend", "lightning_scan"]


@torch.no_grad()
def test_a_compiled_model_is_not_compiled_again_at_every_step() -> None:
    model = tiny_model(**LAYERS)
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, backend=counter)
    cache = new_cache(model.config, reserve=100)
    model(tokens(1, 30), cache=cache)
    for _ in range(12):
        step(tokens(1, 1), cache=cache)
    # the lengths that it was compiled for first, then any; and each tier's first complete window
    assert counter.frame_count <= 5
