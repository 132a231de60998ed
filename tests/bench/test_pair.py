"""A hybrid and its baseline take turns; what does not fit or takes too long is said, and never looks measured."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from sala.bench import LatencyPlan, pair, run_latency, shapes
from sala.bench.ceilings import Ceilings
from sala.bench.pair import our_config, prefill_flops, times_faster
from sala.bench.shapes import ModelShape, baseline_config, hybrid_config
from sala.errors import InputError
from sala.model.report import num_parameters

PLAN = LatencyPlan(
    shape="tiny", lengths=(100, 200), dtype=torch.float32, device="cpu", chunk=64, new_tokens=3, repeats=2
)
PLENTY = 2**40


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"tiny": ModelShape(hidden_size=64, layers=4, heads=4, groups=1, vocab_size=96)}
    monkeypatch.setattr(shapes, "HYBRIDS", rows)
    monkeypatch.setattr(pair, "HYBRIDS", rows)
    monkeypatch.setattr(pair, "measure_ceilings", lambda timer, dtype: Ceilings({"float32": 1e11}, 3e10, 2e10))


def test_both_are_measured_in_turns_at_every_length() -> None:
    said: list[str] = []
    kept: list[int] = []
    results = run_latency(PLAN, said.append, lambda results: kept.append(len(results["points"])), lambda: PLENTY)
    points = results["points"]
    assert [(p["length"], p["who"], p["status"]) for p in points] == [
        (length, who, "measured") for length in (100, 200) for who in ("hybrid", "baseline")
    ]
    turns = [line for line in said if line.endswith(", 100")]
    assert turns == ["tiny, 100", "tiny-full-attention, 100"] * 2
    assert kept == [2, 4]
    for point in points:
        assert len(point["first_token_each_s"]) == 2 and len(point["decode_each_s"]) == 6
        assert point["decode_tokens_s"] == pytest.approx(1 / point["decode_s"])
        # forecast and cache agree
        assert point["cache_bytes"] == point["predicted"]["cache"]
    assert {length for length, _, _ in times_faster(points)} == {100, 200}
    assert results["baseline_reading"]["chosen"] in ("chunks", "at once")


def test_the_curve_has_a_sample_a_chunk() -> None:
    (point,) = run_latency(replace(PLAN, only=("hybrid",), lengths=(200,)), available=lambda: PLENTY)["points"]
    if point["peak_bytes"] is None:
        pytest.skip("this system does not tell a process's peak")
    assert point["curve"]["columns"] == ["tokens", "resident_bytes", "peak_bytes"]
    assert [sample.tokens for sample in point["curve"]["samples"]] == [0, 64, 128, 192, 200, 203]
    assert point["peak_bytes"] == max(sample.peak_bytes for sample in point["curve"]["samples"])
    assert point["added_bytes"] == point["peak_bytes"] - point["start_bytes"] >= 0


def test_what_would_not_fit_is_marked_before_it_is_tried() -> None:
    weights = sum(num_parameters(c) for c in (hybrid_config("tiny"), our_config(baseline_config("tiny")))) * 4
    first, second = run_latency(replace(PLAN, lengths=(200,)), available=lambda: weights + 2**20)["points"]
    for point in (first, second):
        assert point["status"] == "OOM" and point["reason"].startswith("predicted")
        assert "first_token_s" not in point
    assert not list(times_faster([first, second]))


def test_an_allocation_that_fails_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pair.timed_answer

    def too_large(model: Any, cache: Any, tokens_T: torch.Tensor, **options: Any) -> Any:
        if len(tokens_T) == 200 and "Qwen3" in type(model).__name__ and options["chunk"] == 200:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
        return right(model, cache, tokens_T, **options)

    monkeypatch.setattr(pair, "timed_answer", too_large)
    monkeypatch.setattr(pair, "_reading", lambda *_: {"chosen": "at once"})
    points = run_latency(PLAN, available=lambda: PLENTY)["points"]
    assert [point["status"] for point in points] == ["measured", "measured", "measured", "OOM"]


def test_a_model_that_fails_takes_nothing_from_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pair.timed_answer

    def broken(model: Any, cache: Any, tokens_T: torch.Tensor, **options: Any) -> Any:
        if len(tokens_T) == 200 and "MiniCPM" in type(model).__name__:
            raise RuntimeError("an illegal memory access was encountered")
        return right(model, cache, tokens_T, **options)

    monkeypatch.setattr(pair, "timed_answer", broken)
    results = run_latency(PLAN, available=lambda: PLENTY)
    assert [point["status"] for point in results["points"]] == ["measured", "measured", "failed", "measured"]
    assert {(f["case"], f["who"], f["length"]) for f in results["failures"]} == {("tiny", "hybrid", 200)}


def test_where_no_graph_can_be_recorded_decoding_is_plain_and_the_failure_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = pair.timed_answer

    def broken(*arguments: Any, recorded: bool, **options: Any) -> Any:
        if recorded:
            raise RuntimeError("operation not permitted when stream is capturing")
        return right(*arguments, **options)

    monkeypatch.setattr(pair, "timed_answer", broken)
    monkeypatch.setattr(pair, "why_not_capturable", lambda model: None)
    results = run_latency(replace(PLAN, lengths=(64,), only=("hybrid",)), available=lambda: PLENTY)
    assert [point["status"] for point in results["points"]] == ["measured"]
    assert results["models"]["hybrid"]["decoding"] == "a recorded graph failed"
    (failure,) = results["failures"]
    assert "capturing" in failure["error"] and failure["who"] == "decoding by a recorded graph"


def test_a_length_over_the_limit_is_skipped_and_its_time_foretold_by_operations() -> None:
    plan = replace(PLAN, lengths=(64, 4096), limit_s=1e-9, repeats=5)
    first, _, skipped, _ = run_latency(plan, available=lambda: PLENTY)["points"]
    assert first["status"] == "measured" and len(first["first_token_each_s"]) == 1  # not repeated either
    assert skipped["status"] == "skipped" and "first_token_s" not in skipped
    assert skipped["expected_s"] > 60 * first["first_token_s"]
    assert "at 64 tokens" in skipped["expected_from"]


def test_operations_of_a_prompt_grow_with_the_square_only_with_full_attention() -> None:
    def growth(config: Any) -> float:
        contestant = pair.Contestant("", "", None, config, num_parameters(config), 64, lambda n: None, lambda c: 0)
        return prefill_flops(contestant, 2**20) / prefill_flops(contestant, 2**19)

    assert growth(our_config(baseline_config("tiny"))) == pytest.approx(4, rel=0.05)
    # selection still looks at every compressed key
    assert growth(hybrid_config("tiny")) < 3.5


@pytest.mark.parametrize(
    ("change", "available", "message"),
    [
        ({"shape": "tinny"}, PLENTY, "did you mean 'tiny'"),
        ({"only": ("hybird",)}, PLENTY, "did you mean 'hybrid'"),
        ({"repeats": 0}, PLENTY, "at least one"),
        ({}, 2**20, "take .* 1 MiB are available; .* --only"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], available: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_latency(replace(PLAN, **change), available=lambda: available)
