"""Steps that are all alike draw what the model draws, and nothing in them looks at what only the device knows."""

from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from devices import GPU
from model.shapes import TINY_SPARSE, tiny_model, tokens
from sala.engine import Sampling, graph
from sala.engine.generate import prefill
from sala.engine.graph import Steps
from sala.engine.sampling import Sampler
from sala.model import MiniCPMSALAForCausalLM, new_cache
from sala.ops import dispatch, gpu

KINDS = {
    "hybrid": {},
    "attention": {"mixer_types": ["attention"] * 4, "attn_use_rope": True, "attention_qk_norm": True},
    "exact": {"mixer_types": ["minicpm4"] * 4, "sparse_config": {**TINY_SPARSE, "normalizer": "exact"}},
    "whole-rows": {"sparse_config": {**TINY_SPARSE, "dense_rule": "sequence", "dense_len": 80}},
    "scaled-logits": {"attn_logits_scaling": 20, "lightning_nkv": 2},
}
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def small_capacities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MIN_CAPACITY", 16)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels for GPUs be chosen on the CPU, where Triton's interpreter runs them."""
    if (why_not := gpu.unavailable()) is not None:
        pytest.skip(why_not)
    for op in ("lightning", "infllm"):
        triton = replace(dispatch.BACKENDS[op]["triton"], devices=("cpu",))
        monkeypatch.setattr(dispatch, "BACKENDS", MappingProxyType({**dispatch.BACKENDS, op: {"triton": triton}}))


def steps_after(
    model: MiniCPMSALAForCausalLM, prompt: int, longest: int, sampling: Sampling | None = None, reserve: int = 0
) -> tuple[Steps, torch.Tensor]:
    """Return steps behind a prompt, one token of which they have yet to read, and the tokens that they will go on with."""
    device = model.device
    seen = torch.zeros(1, longest, dtype=torch.long, device=device)
    seen[:, :prompt] = tokens(1, prompt)
    cache = new_cache(model.config, reserve)
    prefill(model, seen[:, : prompt - 1], cache, 2048)
    return Steps(model, cache, seen, prompt, Sampler(sampling or Sampling(), device)), seen


def check_against_the_model(model: MiniCPMSALAForCausalLM, prompt: int, new: int, reserve: int = 0) -> None:
    steps, seen = steps_after(model, prompt, prompt + new, reserve=reserve)
    logits = []
    for _ in range(new):
        token = steps.next()
        logits.append(steps.logits_1X.clone())
        assert token == logits[-1].argmax()
    cache = new_cache(model.config)
    prefill(model, seen[:, : prompt - 1], cache, 2048)
    with torch.no_grad():
        parts = [model(token, past_key_values=cache).logits for token in seen[:, prompt - 1 : -1].split(1, dim=1)]
    torch.testing.assert_close(torch.stack(logits, 1), torch.cat(parts, 1), atol=2e-4, rtol=1e-4)


# windows of 8 and 32 keys complete, 64 keys are read whole, and 16, 32, 64 and 128 places are had
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "new"), [(2, 40), (60, 90)])
def test_steps_are_the_model_s_own(kind: str, prompt: int, new: int) -> None:
    check_against_the_model(tiny_model(**KINDS[kind]), prompt, new)


@pytest.mark.parametrize("prompt", [2, 61])
def test_steps_through_the_kernels_for_gpus_are_the_model_s_own(prompt: int, interpreted: None) -> None:
    check_against_the_model(tiny_model(), prompt, 5, reserve=70)


def test_the_cache_goes_on_where_steps_ended() -> None:
    model = tiny_model()
    steps, seen = steps_after(model, 50, 120)
    for _ in range(60):
        steps.next()
    steps.finish()
    cache, own = steps.cache, new_cache(model.config)
    with torch.no_grad():
        model(seen[:, :109], past_key_values=own)
        assert (cache.columns, cache.size_bytes) == (109, own.size_bytes)
        more = tokens(1, 30, seed=1)
        after, expected = (model(more, past_key_values=c).logits for c in (cache, own))
    torch.testing.assert_close(after, expected, atol=2e-4, rtol=1e-4)


def test_a_row_steps_as_in_a_batch() -> None:
    model, ids = tiny_model(), tokens(3, 70)
    with torch.inference_mode():
        cache = new_cache(model.config, reserve=80)
        model(ids[:, :69], past_key_values=cache)
        hidden = model.model.step(ids[:, 69:], torch.tensor([69]), cache, 80)
        expected = model.model(ids, use_cache=False).last_hidden_state[:, 69:]
    torch.testing.assert_close(hidden, expected, atol=2e-4, rtol=1e-4)


def test_draws_are_those_of_the_seed_and_of_the_tokens_so_far() -> None:
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.5, seed=3)
    model = tiny_model()
    steps, seen = steps_after(model, 40, 60, sampling)
    drawn = [int(steps.next()) for _ in range(20)]
    assert seen[0, 40:].tolist() == drawn
    sampler, expected = Sampler(sampling, model.device), tokens(1, 40)
    with torch.no_grad():
        for _ in range(20):
            token = sampler.draw(expected, model(expected).logits[:, -1])
            expected = torch.cat([expected, token[None]], 1)
    assert expected[0, 40:].tolist() == drawn


class Launches(TorchDispatchMode):
    """Writes down every operation with its shapes, and refuses those that look at numbers or cross devices."""

    LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item", "repeat_interleave.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        assert not name.startswith(self.LOOKS), f"{name} looks at numbers"
        flat = torch.utils._pytree.tree_leaves((args, kwargs, result))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim}
        assert len(devices) <= 1, f"{name} has tensors on {devices}"
        self.seen.append(f"{name} {[(tuple(x.shape), x.dtype) for x in tensors]}")
        return result


def launches_of(steps: Steps) -> list[str]:
    with Launches() as launches:
        steps.next()
    return launches.seen


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_the_same_launches(kind: str) -> None:
    sampling = Sampling(temperature=0.8, top_k=9, top_p=0.9, repetition_penalty=1.2, seed=0)
    # from position 30, over the border at 64, within the 128 places that were had at once
    steps, _ = steps_after(tiny_model(**KINDS[kind]), 30, 128, sampling)
    steps.capacity = 128
    steps.cache.hold(128)
    first = launches_of(steps)
    assert len(first) > 50
    for length in (32, 64, 65, 120):
        while steps.length < length:
            steps.next()
        assert launches_of(steps) == first
