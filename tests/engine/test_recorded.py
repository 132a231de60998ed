"""Laws of a CPU's recorded step: the same tokens, nothing of torch inside the layers, and a reason where there is none."""

import logging

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.shapes import TINY_SPARSE, tiny_model, tokens
from sala.engine import graph
from sala.engine.generate import prefill
from sala.engine.graph import GraphDecoder, why_not_capturable
from sala.engine.sampling import Sampler, Sampling
from sala.errors import BackendError
from sala.model import MiniCPMSALAForCausalLM, new_cache
from sala.model.packing import pack_all, packed_modules
from sala.ops import native
from sala.ops.dispatch import unavailable
from sala.ops.linear import linear
from sala.quant.run import Settings

pytestmark = pytest.mark.skipif(unavailable("linear", "cpu") is not None, reason="no C++ here")

# four blocks of 16 are read, one of them freely chosen; windows end every 4 and every 16 tokens
CHOOSING = {**TINY_SPARSE, "window_size": 16, "topk": 3}
KINDS = {
    "hybrid": {"sparse_config": CHOOSING},
    "attention": {"mixer_types": ["attention"] * 4, "attn_use_rope": True, "attention_qk_norm": True, "qkv_bias": True},
    "exact": {"mixer_types": ["minicpm4"] * 4, "sparse_config": {**CHOOSING, "normalizer": "exact"}},
    "whole-rows": {"sparse_config": {**CHOOSING, "dense_rule": "sequence", "dense_len": 80}},
    "quantized": {"sparse_config": CHOOSING, "packing": Settings(group=8).fields()},
}


@pytest.fixture(autouse=True)
def small_capacities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MIN_CAPACITY", 64)


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> MiniCPMSALAForCausalLM:
    model = tiny_model(**KINDS[kind])
    for _, part in packed_modules(model):
        part.qweight.random_(-(2**31), 2**31)
        part.qzeros.fill_(0x77777777)
        part.scales.fill_(0.02)
    pack_all(model, "a test")
    return model.to(dtype)


def steps_of(model: MiniCPMSALAForCausalLM, prompt: int, longest: int) -> tuple[GraphDecoder, Tensor]:
    seen = torch.zeros(1, longest, dtype=torch.long)
    seen[:, :prompt] = tokens(1, prompt)
    cache = new_cache(model.config)
    prefill(model, seen[:, : prompt - 1], cache, 2048)
    return GraphDecoder(model, cache, seen, prompt, Sampler(Sampling(), model.device)), seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_are_those_of_the_model_itself(kind: str, dtype: torch.dtype) -> None:
    model = model_of(kind, dtype)
    assert why_not_capturable(model) is None
    steps, seen = steps_of(model, 20, 400)
    cache, length = new_cache(model.config), 20
    with torch.inference_mode():
        model(seen[:, :19], cache=cache)
        logits = model(seen[:, 19:20], cache=cache).logits
        while length < 400:
            assert steps.next() == logits.argmax(), length
            assert steps.layers is not None
            length += 1
            logits = model(seen[:, length - 1 : length], cache=cache).logits
    steps.finish()
    assert steps.cache.columns == 399


class Computed(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_torch_computes_nothing_inside_the_layers() -> None:
    counts = []
    for layers in (2, 6):
        model = tiny_model(num_hidden_layers=layers, mixer_types=["minicpm4", "lightning-attn"] * (layers // 2))
        steps, _ = steps_of(model, 20, 60)
        steps.next()
        with Computed() as computed:
            steps.next()
        counts.append(len(computed.names))
    assert counts[0] == counts[1] < 60


def test_what_sees_every_step_or_computes_in_torch_is_named() -> None:
    assert "attn_logits_scaling" in str(why_not_capturable(tiny_model(attn_logits_scaling=20)))
    assert "kernels in C++ take float32" in str(why_not_capturable(tiny_model().half()))
    model = tiny_model()
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert why_not_capturable(model) == "model.layers.1.mlp has a hook, which wants to see every step"


def test_a_layer_that_cannot_be_recorded_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def built() -> MiniCPMSALAForCausalLM:
        model = tiny_model(**KINDS["hybrid"])
        inner = model.model.layers[-1].mlp.forward
        model.model.layers[-1].mlp.forward = lambda x: inner(x) * 0.5
        return model

    model = built()
    steps, seen = steps_of(model, 20, 90)
    with caplog.at_level(logging.INFO, "sala"):
        while steps.length < 90:
            steps.next()
    assert caplog.text.count("decoding steps are not recorded: aten.mul") == 1
    cache = new_cache(model.config)
    with torch.inference_mode():
        assert torch.equal(model(seen[:, :-1], cache=cache).logits[0, 19:].argmax(-1), seen[0, 20:])


def test_a_tape_makes_the_same_calls_on_what_is_in_memory_now() -> None:
    x, weight = torch.randn(2, 16), torch.randn(5, 16)
    with torch.inference_mode():
        linear(x, weight)
        with native.record() as tape:
            out = linear(linear(x, weight), weight[:5, :5])
        x.copy_(torch.randn(2, 16))
        tape.replay()
        assert torch.equal(out, linear(linear(x, weight), weight[:5, :5]))


def test_a_tape_refuses_what_it_would_not_repeat() -> None:
    from sala.ops.lightning import lightning_attention

    x, log_decay = torch.randn(1, 3, 2, 16), torch.full((2,), -0.1)
    with torch.inference_mode():
        lightning_attention(x, x, x, log_decay, scale=1.0, backend="cpu")
        with pytest.raises(BackendError, match="aten.add.Tensor runs between the kernels; expected"), native.record():
            x + 1
        with pytest.raises(BackendError, match="sala_lightning runs, which has no form for a tape"), native.record():
            lightning_attention(x, x, x, log_decay, scale=1.0, backend="cpu")
