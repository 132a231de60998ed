"""Steps that are all alike draw what the model draws, and nothing in them looks at what only the device knows."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from devices import GPU
from model.shapes import TINY_SPARSE, tiny_model, tokens
from sala.engine import Sampling, generate, graph
from sala.engine.generate import prefill
from sala.engine.graph import GraphDecoder, why_not_capturable, why_not_static
from sala.engine.sampling import Sampler
from sala.errors import BackendError, InputError
from sala.model import MiniCPMSALAForCausalLM, SalaCache, new_cache
from sala.model.cache import LightningCache
from sala.model.rows import place_steps
from sala.ops import constants

# four blocks of 16 are read, one of them freely chosen
CHOOSING = {**TINY_SPARSE, "window_size": 16, "topk": 3}
KINDS = {
    "hybrid": {"sparse_config": CHOOSING},
    "attention": {"mixer_types": ["attention"] * 4, "attn_use_rope": True, "attention_qk_norm": True},
    "exact": {"mixer_types": ["minicpm4"] * 4, "sparse_config": {**CHOOSING, "normalizer": "exact"}},
    "whole-rows": {"sparse_config": {**CHOOSING, "dense_rule": "sequence", "dense_len": 80}},
    "scaled-logits": {"attn_logits_scaling": 20, "lightning_nkv": 2, "sparse_config": CHOOSING},
}


@pytest.fixture(autouse=True)
def small_capacities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MIN_CAPACITY", 16)


def steps_after(
    model: MiniCPMSALAForCausalLM, prompt: int, longest: int, sampling: Sampling | None = None, reserve: int = 0
) -> tuple[GraphDecoder, torch.Tensor]:
    """Return steps behind a prompt, one token of which they have yet to read, and the tokens that they will go on with."""
    device = model.device
    seen = torch.zeros(1, longest, dtype=torch.long, device=device)
    seen[:, :prompt] = tokens(1, prompt)
    cache = new_cache(model.config, reserve)
    prefill(model, seen[:, : prompt - 1], cache, 2048)
    return GraphDecoder(model, cache, seen, prompt, Sampler(sampling or Sampling(), device)), seen


def check_against_the_model(
    model: MiniCPMSALAForCausalLM,
    prompt: int,
    new: int,
    reserve: int = 0,
    after_prompt: Callable[[], None] = lambda: None,
) -> None:
    cache = new_cache(model.config)
    steps, seen = steps_after(model, prompt, prompt + new, reserve=reserve)
    prefill(model, seen[:, : prompt - 1], cache, 2048)
    after_prompt()
    logits = []
    for _ in range(new):
        token = steps.next()
        logits.append(steps.logits_1X.clone())
        assert token == logits[-1].argmax()
    with torch.no_grad():
        parts = [model(token, cache=cache).logits for token in seen[:, prompt - 1 : -1].split(1, dim=1)]
    torch.testing.assert_close(torch.stack(logits, 1), torch.cat(parts, 1), atol=2e-4, rtol=1e-4)


# windows of 8 and 32 keys complete, 64 keys are read whole, and 16, 32, 64 and 128 places are had
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "new"), [(2, 40), (60, 75)])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "as it is"])
def test_steps_are_the_model_s_own(
    kind: str, prompt: int, new: int, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not recorded:
        monkeypatch.setattr(graph, "why_not_recordable", lambda model: "a test")
    check_against_the_model(tiny_model(**KINDS[kind]), prompt, new)


@pytest.mark.skipif(GPU, reason="interprets the kernels")
def test_steps_through_the_kernels_for_gpus_are_the_model_s_own(chosen_on: Callable[..., None]) -> None:
    # 24 tokens are read whole, then three blocks of 8, one of them freely chosen
    sparse = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 0, "topk": 3, "dense_len": 1}
    model = tiny_model(num_hidden_layers=2, mixer_types=["minicpm4", "lightning-attn"], sparse_config=sparse)
    check_against_the_model(model, 22, 5, 32, lambda: chosen_on("cpu", "lightning", "infllm"))


def test_the_cache_goes_on_where_steps_ended() -> None:
    model = tiny_model(**KINDS["hybrid"])
    steps, seen = steps_after(model, 50, 120)
    for _ in range(60):
        steps.next()
    steps.finish()
    cache, own = steps.cache, new_cache(model.config)
    with torch.no_grad():
        model(seen[:, :109], cache=own)
        assert (cache.columns, cache.size_bytes) == (109, own.size_bytes)
        more = tokens(1, 30, seed=1)
        after, expected = (model(more, cache=c).logits for c in (cache, own))
    torch.testing.assert_close(after, expected, atol=2e-4, rtol=1e-4)


def test_a_row_steps_as_in_a_batch() -> None:
    model, ids = tiny_model(), tokens(3, 70)
    with torch.inference_mode():
        cache = new_cache(model.config, reserve=80)
        model(ids[:, :69], cache=cache)
        rows = model.model.rotated(place_steps(torch.tensor([69]), 3, 80, cache.tiers))
        hidden = model.model.run(ids[:, 69:], rows, cache.layers)
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
    """Writes down every operation with its shapes, and every kernel; refuses what looks at numbers or crosses devices."""

    LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item")

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
        # how numbers of Python become a tensor: on a device by a copy
        assert name != "lift_fresh.default" or devices <= {"cpu"}, "numbers are sent to the device"
        assert len(devices) <= 1, f"{name} has tensors on {devices}"
        self.seen.append(f"{name} {[(tuple(x.shape), x.dtype) for x in tensors]}")
        return result


@pytest.fixture
def sent_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let constants be those sent before, as without a mode that sees operations."""
    for user in ("rope", "lightning"):
        monkeypatch.setattr(f"sala.model.{user}.constant", constants._sent)


def addresses(cache: SalaCache) -> list[int]:
    """Return where everything is that a cache holds."""
    held = [tensor.buffer for layer in cache.layers for tensor in layer.tensors()]
    held += [layer.state_BHKV for layer in cache.layers if isinstance(layer, LightningCache)]
    return [tensor.data_ptr() for tensor in held]


def launches_of(steps: GraphDecoder) -> list[str]:
    with Launches() as launches:
        steps.next()
    return launches.seen


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_the_same_launches(kind: str) -> None:
    sampling = Sampling(temperature=0.8, top_k=9, top_p=0.9, repetition_penalty=1.2, seed=0)
    # from position 30, over the border at 64, within the 128 places that were had at once
    steps, _ = steps_after(tiny_model(**KINDS[kind]), 30, 128, sampling)
    # what a GPU would be told
    steps.records = False
    steps.capacity = 128
    steps.cache.hold(128)
    places = addresses(steps.cache)
    first = launches_of(steps)
    assert len(first) > 50
    for length in (32, 64, 65, 120):
        while steps.length < length:
            steps.next()
        assert launches_of(steps) == first
        assert addresses(steps.cache) == places


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_device_neither_looks_nor_copies_nor_depends_on_the_position(
    kind: str, on_meta: list[str], sent_constants: None
) -> None:
    model = tiny_model(**KINDS[kind]).to("meta")
    seen = torch.zeros(1, 128, dtype=torch.long, device="meta")
    cache = new_cache(model.config, 128)
    prefill(model, seen[:, :69], cache, 2048)
    steps = GraphDecoder(model, cache, seen, 70, Sampler(Sampling(), torch.device("cpu")))
    steps.next()
    recorded = []
    for length in (71, 95, 127):
        steps.length = length
        on_meta.clear()
        recorded.append((launches_of(steps), list(on_meta)))
    operations, kernels = recorded[0]
    assert len(operations) > 50 and len(kernels) > 10
    assert recorded[1:] == recorded[:1] * 2


def test_a_step_is_recorded_once_for_each_number_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, _ = steps_after(tiny_model(), 30, 70)
    recorded = []

    class Recording:
        def __init__(self, steps: GraphDecoder, stream: object) -> None:
            self.capacity = steps.capacity
            recorded.append(self.capacity)

        def replay(self) -> None:
            assert steps.capacity == self.capacity
            steps._run()

    monkeypatch.setattr(GraphDecoder, "_record", lambda *arguments: Recording(*arguments))
    monkeypatch.setattr(GraphDecoder, "_run_aside", GraphDecoder._run)
    monkeypatch.setattr(steps, "recorder", object())
    while steps.length < 70:
        steps.next()
    assert recorded == [32, 64, 70]


@pytest.fixture
def as_users_run() -> None:
    """Let torch choose the kernels that are recorded outside tests: deterministic ones may be others, with checks of indices."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_step_is_the_model_s_own(kind: str) -> None:
    model = tiny_model(**KINDS[kind]).cuda()
    assert why_not_capturable(model) is None
    check_against_the_model(model, 60, 75)
    steps, _ = steps_after(model, 60, 64)
    steps.next()
    assert steps.graph is None
    steps.next()
    assert steps.graph is not None


@pytest.mark.gpu
@pytest.mark.usefixtures("as_users_run")
def test_recorded_draws_differ_from_step_to_step_and_not_by_seed() -> None:
    model, sampling = tiny_model().cuda(), Sampling(temperature=5.0, seed=3)
    drawn = []
    for _ in range(2):
        steps, seen = steps_after(model, 40, 70, sampling)
        for _ in range(30):
            steps.next()
        drawn.append(seen[0, 40:].tolist())
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 10


def test_an_operator_that_looks_at_positions_is_named() -> None:
    assert why_not_static(tiny_model(mixer_types=["lightning-attn", "attention"] * 2)) is None
    assert "block-sparse attention runs through" in str(why_not_static(tiny_model()))


def test_the_kernels_for_gpus_look_at_nothing(on_meta: list[str]) -> None:
    assert why_not_static(tiny_model().to("meta")) is None


def test_a_model_elsewhere_is_not_recorded_and_says_why() -> None:
    assert why_not_capturable(tiny_model().to("meta")) == "the model is on meta; steps are recorded on a GPU or a CPU"
    model = tiny_model().half()
    with pytest.raises(InputError, match="no step can be recorded: the model is torch.float16; .*ask for none"):
        generate(model, None, [1, 2], Sampling(), graph=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can be recorded")
def test_a_step_that_cannot_be_recorded_is_one_error_that_says_what_to_do() -> None:
    steps, _ = steps_after(tiny_model(), 40, 43)
    with pytest.raises(BackendError, match=r"could not be recorded as a CUDA graph: .*--no-graph"):
        steps._record(torch.Stream("cpu"))
