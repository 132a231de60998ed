"""Operators are checked before they are timed, and what is counted is what they have to do."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import tolerances
from sala.bench import OpsPlan, ParityError, device, fla, parity, run_ops, sdpa, write_results
from sala.bench import ops as ops_module
from sala.bench.cases import CASES
from sala.bench.ceilings import Ceilings
from sala.bench.cost import compressed_bytes, infllm_step, lightning_prefill
from sala.bench.inputs import Inputs
from sala.bench.ops import check
from sala.bench.shapes import AttentionShape
from sala.errors import InputError
from sala.ops import dispatch
from sala.ops.infllm import SparseGeometry

TINY = AttentionShape(4, 2, 16, 4, 16, SparseGeometry(8, 4, 1, 16, 32, 2, 64))
CPU = torch.device("cpu")
PLAN = OpsPlan(shape="tiny", lengths=(100, 200), dtype=torch.float32, device="cpu", repeats=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape "tiny", and ceilings that take no time to measure."""
    monkeypatch.setattr(ops_module, "attention_shape", lambda name: TINY)
    speeds = {"float32": 1e11, "bfloat16": 2e11}
    monkeypatch.setattr(ops_module, "measure_ceilings", lambda timer, dtype: Ceilings(speeds, 3e10, 2e10))
    monkeypatch.setattr(device, "FLUSH_BYTES", 1024)
    monkeypatch.setattr(parity, "PARITY_LIGHTNING_TOKENS", 70)


def test_tolerances_are_those_of_the_tests() -> None:
    assert dict(parity.TOLERANCES) == tolerances.TOLERANCES


def test_every_case_is_checked_and_timed_with_all_its_competitors() -> None:
    said: list[str] = []
    results = run_ops(PLAN, said.append)
    assert [(row["op"], row["phase"], row["length"]) for row in results["cases"]] == [
        (case.op, case.phase, length) for case in CASES for length in (100, 200)
    ]
    for row in results["cases"]:
        competitors = row["competitors"]
        assert set(competitors) >= {"eager"} | ({"sdpa"} if row["phase"] != "selection" else set())
        samples = 2 * (ops_module.SHORT_SAMPLES if row["cold"] else 1)
        for facts in competitors.values():
            assert len(facts["samples_s"]) == samples
            assert 0 < facts["min_s"] <= facts["median_s"] <= max(facts["samples_s"])
        eager = competitors["eager"]
        assert eager["times_floor"] == pytest.approx(eager["median_s"] / row["roof_s"])
        if "sdpa" in competitors:
            expected = competitors["sdpa"]["median_s"] / eager["median_s"]
            assert row["times_faster_than_sdpa"]["eager"] == pytest.approx(expected)
            assert competitors["sdpa"]["heads_measured"] == competitors["sdpa"]["heads"] == 4
    assert set(results["parity"]) == {case.name for case in CASES}
    assert "infllm step, 200" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_backend_passes_its_check(case: Any, dtype: torch.dtype) -> None:
    for backend in case.competitors(CPU):
        if case.trains and backend == "cpu":
            continue  # it has no gradients, and says so
        if dispatch.unavailable(case.op, backend) is None:
            assert check(case, Inputs(TINY, dtype), backend)


@pytest.mark.parametrize(
    ("name", "operator", "spoil"),
    [
        ("lightning prefill", "lightning_attention", lambda result: (result[0] * 1.01, result[1])),
        ("lightning step", "lightning_attention", lambda result: (result[0], result[1] + 1e-2)),
        ("infllm prefill", "infllm_attention", lambda out: out.index_fill(1, torch.tensor([257]), torch.nan)),
        ("infllm selection", "select_blocks", lambda table: table.flip(1)),
        ("infllm step", "infllm_attention", lambda out: out * 1.01),
        ("lightning training", "lightning_attention", lambda result: (result[0] * 1.01, result[1])),
        ("infllm training", "infllm_attention", lambda out: out * 1.01),
    ],
)
def test_a_wrong_operator_is_not_timed(name: str, operator: str, spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    where = fla if operator == "lightning_attention" else parity
    right = getattr(where, operator)

    def wrong(*arguments: Any, backend: str, **options: Any) -> Any:
        result = right(*arguments, backend=backend, **options)
        return result if backend == "reference" else spoil(result)

    monkeypatch.setattr(where, operator, wrong)
    op, phase = name.split()
    (case,) = (case for case in CASES if case.name == name)
    message = f"{name}, backend eager, float32: differs from .* not timed"
    with pytest.raises(ParityError, match=message):
        check(case, Inputs(TINY, torch.float32), "eager")
    results = run_ops(replace(PLAN, ops=(op,), phases=(phase,), only=("eager",)))
    (failure,) = results["failures"]
    assert re.match(message, failure["error"]) and "check" in failure["traceback"]
    assert all("eager" not in row["competitors"] for row in results["cases"])


def test_a_competitor_that_fails_takes_nothing_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("out of registers")

    monkeypatch.setattr(sdpa, "prefill", broken)
    kept: list[int] = []
    results = run_ops(
        replace(PLAN, ops=("dense",), phases=("prefill",)), keep=lambda results: kept.append(len(results["cases"]))
    )
    assert [(f["who"], f["length"], f["error"]) for f in results["failures"]] == [
        ("sdpa", length, "ValueError: out of registers") for length in (100, 200)
    ]
    assert all("median_s" in row["competitors"]["eager"] for row in results["cases"])
    assert kept == [1, 2]


def test_a_sample_over_the_limit_is_foretold_and_not_taken() -> None:
    plan = replace(PLAN, ops=("dense",), phases=("prefill",), lengths=(100, 5000), limit_s=1e-3, only=("eager",))
    first, second = run_ops(plan)["cases"]
    facts = second["competitors"]["eager"]
    assert "median_s" not in facts and "eager" not in second["times_faster_than_sdpa"]
    work = second["cost"]["flops"] / first["cost"]["flops"]
    assert facts["expected_s"] == pytest.approx(first["competitors"]["eager"]["median_s"] * work)


def test_sdpa_on_some_of_the_heads_is_scaled_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 64, heads, 16) for heads in (8, 2, 2))
    a_head = 2 * 64 * 64 * 16

    def measured(heads: float) -> int:
        monkeypatch.setattr(sdpa, "OPERATIONS", {"cpu": heads * a_head})
        return sdpa.prefill(q, k, v, device.HostTimer()).heads_measured

    # a part of a group, or whole groups
    assert [measured(heads) for heads in (0, 1.5, 3.5, 5.5, 99)] == [1, 1, 3, 4, 8]


def test_a_selection_that_selects_nothing_says_so() -> None:
    (row,) = run_ops(replace(PLAN, phases=("selection",), lengths=(60,)))["cases"]
    assert "nothing is selected before position 64" in row["skipped"] and not row["competitors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": ("lightening",)}, "did you mean 'lightning'"),
        ({"only": ("eagre",)}, "did you mean 'eager'"),
        ({"phases": ("decode",)}, "no phase 'decode'"),
        ({"clock": "sun"}, "clock 'sun'"),
        ({"ops": ("dense",), "phases": ("selection",)}, "no case"),
        ({"lengths": ()}, "at least one of each"),
    ],
)
def test_what_is_not_there_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_ops(replace(PLAN, **change))


def test_neighbouring_tokens_are_alike_where_asked() -> None:
    drawn = {
        correlated: Inputs(TINY, torch.float32, correlated).draw(4000, 1, 8, 1)[0, 500:, 0] for correlated in (0, 1)
    }
    for correlated, x_TK in drawn.items():
        assert x_TK.var().item() == pytest.approx(1, abs=0.1)
        assert (x_TK[1:] * x_TK[:-1]).mean().item() == pytest.approx(0.9 * correlated, abs=0.1)


# counts


def test_keys_and_windows_are_counted_one_by_one() -> None:
    geometry = TINY.geometry
    first = geometry.first_sparse_position(199)
    keys = windows = 0
    for p in range(200):
        if p < first:
            keys += p + 1
        else:
            keys += (geometry.num_selected - 1) * geometry.block_size + p % geometry.block_size + 1
            windows += sum(8 - 1 + 4 * j <= p for j in range(200)) + sum(32 - 1 + 16 * j <= p for j in range(200))
    assert (TINY.geometry.keys_read(200), TINY.geometry.windows_scored(200)) == (keys, windows)
    # 49 windows of 8 and 11 of 32 are complete after 200 tokens
    assert compressed_bytes(TINY, 200, 2) == (49 + 11) * 2 * 16 * 2


def test_a_step_reads_the_selected_blocks_and_all_compressed_keys() -> None:
    step = infllm_step(TINY, 200, 2)
    keys = 3 * 16 + 199 % 16 + 1
    assert step.bytes == keys * 2 * 2 * 16 * 2 + (49 + 11) * 2 * 16 * 2
    assert step.flops == 4 * 16 * (4 * keys + 2 * (49 + 11))
    assert infllm_step(TINY, 50, 2).bytes == 50 * 2 * 2 * 16 * 2  # dense: nothing is selected


def test_the_cost_of_linear_attention_is_linear() -> None:
    one, two = (lightning_prefill(TINY, T, 2) for T in (1000, 2000))
    assert two.flops == 2 * one.flops


def test_results_are_whole_or_not_there(tmp_path: Any) -> None:
    path = tmp_path / "deep" / "ops.json"
    write_results(path, {"kind": "ops"})
    with pytest.raises(TypeError):
        write_results(path, {"kind": object()})
    assert json.loads(path.read_text()) == {"kind": "ops"}
    assert [file.name for file in path.parent.iterdir()] == ["ops.json"]
    with pytest.raises(InputError, match="cannot write"):
        write_results(path / "file.json", {})
