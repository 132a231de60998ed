"""What is measured on a GPU, rehearsed on a pretended one; and that the script's commands are commands."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache

from bench.pretended_gpu import CPU, CUDA, NAME, OnTheCpu, pretend
from sala.bench import LatencyPlan, OpsPlan, ceilings, device, ops, pair, parity, peak_memory, run_latency, run_ops
from sala.bench import baseline as baseline_module
from sala.bench import shapes as shapes_module
from sala.bench.cases import CASES
from sala.bench.device import CudaTimer
from sala.bench.length import parse_length
from sala.bench.memory import MemoryCurve
from sala.bench.ops import _chosen
from sala.bench.shapes import AttentionShape, ModelShape, baseline_config
from sala.cli.bench import bench as bench_app
from sala.errors import InputError
from sala.model.interface import named
from sala.ops.infllm import SparseGeometry
from sala.ops.lightning import lightning_attention

TINY = AttentionShape(4, 2, 16, 4, 16, SparseGeometry(8, 4, 1, 16, 32, 2, 64))
HYBRIDS = {"tiny": ModelShape(hidden_size=64, layers=4, heads=4, groups=1, vocab_size=96)}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the pretended GPU was told."""
    monkeypatch.setattr(device, "FLUSH_BYTES", 1024)
    monkeypatch.setitem(ceilings.SIZES, "cuda", (64, 4096))
    with OnTheCpu():
        yield pretend(monkeypatch)


def fla_that(spoil: float) -> dict[str, ModuleType]:
    """Modules of flash-linear-attention 0.6.0 with the signature of its `chunk_simple_gla`, whose output is multiplied."""

    def chunk_simple_gla(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        g_gamma: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        assert g is None and g_gamma is not None and scale is not None
        out, state = lightning_attention(
            q, k, v, g_gamma, scale=scale, initial_state_BHKV=initial_state, backend="eager"
        )
        return out * spoil, state if output_final_state else None

    modules = {name: ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.simple_gla")}
    modules["fla"].__spec__ = sys.__spec__  # it is looked up
    modules["fla.ops.simple_gla"].chunk_simple_gla = chunk_simple_gla  # type: ignore[attr-defined]
    return modules


@pytest.mark.parametrize("spoil", [1.0, 1.1])
def test_operators_are_timed_on_a_gpu_beside_fla_and_sdpas_fastest_kernel(
    spoil: float, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in fla_that(spoil).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ops, "attention_shape", lambda name: TINY)
    monkeypatch.setattr(parity, "PARITY_LIGHTNING_TOKENS", 70)
    plan = OpsPlan("tiny", (100,), ("lightning",), ("prefill", "training"), ("eager", "fla"), torch.float32, repeats=1)
    results = run_ops(plan)
    assert results["settings"]["device"] == "cuda"
    assert results["environment"]["hardware"]["gpu"]["name"] == NAME
    right = spoil == 1
    assert [(failure["who"], failure["case"]) for failure in results["failures"]] == (
        [] if right else [("fla", "lightning prefill"), ("fla", "lightning training")]
    )
    for row in results["cases"]:
        competitors = row["competitors"]
        assert set(competitors) == {"eager", "sdpa"} | ({"fla"} if right else set())
        assert row["cold"]
        for facts in competitors.values():
            assert facts["added_bytes"] == 4000 and facts["enqueued_s"] > 0
        sdpa = competitors["sdpa"]
        measured = {name: s for name, s in sdpa["kernels"].items() if isinstance(s, float)}
        assert sdpa["kernel"] == min(measured, key=lambda name: measured[name])
        if right:
            ratio = competitors["fla"]["median_s"] / competitors["eager"]["median_s"]
            assert row["times_faster_than_fla"]["eager"] == pytest.approx(ratio)
    # the caches are written over and the device kept busy before every sample
    assert told.count("_sleep") >= sum(len(f["samples_s"]) for r in results["cases"] for f in r["competitors"].values())


def test_a_gpu_has_one_clock(told: list[str]) -> None:
    with pytest.raises(InputError, match="clock 'cpu' on a GPU"):
        run_ops(OpsPlan("small-64x4", clock="cpu"))


def test_an_absent_fla_is_one_line(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "attention_shape", lambda name: TINY)
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setattr("sala.bench.fla.find_spec", lambda name: None)
    plan = OpsPlan("tiny", (64,), ("lightning",), ("prefill",), ("fla",), torch.float32, repeats=1)
    results = run_ops(plan)
    assert results["unavailable"] == {
        "lightning prefill": {"fla": "the package flash-linear-attention is not installed"}
    }
    assert not results["failures"]


def test_what_does_not_fit_is_skipped(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: Any, run: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(ops, "attention_shape", lambda name: TINY)
    monkeypatch.setattr(ops._Bench, "_warmed_up", too_large)
    results = run_ops(OpsPlan("tiny", (100,), ("infllm",), ("selection",), ("eager",), torch.float32, repeats=1))
    assert results["cases"][0]["competitors"] == {"eager": {"skipped": "out of memory"}}
    assert not results["failures"]


def test_what_competes_on_a_gpu_is_what_would_be_chosen_there() -> None:
    found = {case.name: case.competitors(CUDA) for case in CASES}
    assert found["lightning training"] == ("triton", "eager", "fla")
    assert found["infllm step"] == ("triton", "eager")
    assert {case.name: case.competitors(CPU) for case in CASES}["lightning training"] == ("cpu", "eager")


def test_a_gpus_memory_is_what_its_tensors_take(told: list[str]) -> None:
    with peak_memory(CUDA) as memory:
        assert told == ["empty_cache", "reset_peak_memory_stats"]
    assert (memory.start_bytes, memory.peak_bytes, memory.added_bytes) == (1000, 5000, 4000)
    curve = MemoryCurve(CUDA)
    curve.sample(7)
    assert [tuple(sample) for sample in curve.samples] == [(0, 1000, 1000), (7, 1000, 5000)]


def test_a_gpus_time_is_from_event_to_event(told: list[str]) -> None:
    timer = CudaTimer(CUDA)
    order: list[str] = []
    assert timer.seconds(lambda: order.extend([*told, "run"])) >= 0
    assert order == ["_sleep", "run"]
    taken = timer.enqueued()
    assert taken is not None and taken >= 0
    assert timer.enqueued() is None


def test_models_are_measured_on_a_gpu(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shapes_module, pair):
        monkeypatch.setattr(module, "HYBRIDS", HYBRIDS)
    monkeypatch.setattr(pair, "why_not_capturable", lambda model: "no graph here")
    monkeypatch.setattr(baseline_module, "PROBE_TOKENS", 64)
    # at once the baseline's prompt would not fit at the second length
    right = pair.Contestant.need

    def need(self: Any, length: int, dtype: torch.dtype) -> Any:
        found = right(self, length, dtype)
        return replace(found, working=2**40) if self.chunk is None and length == 130 else found

    monkeypatch.setattr(pair.Contestant, "need", need)
    monkeypatch.setattr(pair, "_reading", lambda *_: {"chosen": "at once"})
    plan = LatencyPlan(shape="tiny", lengths=(100, 130), dtype=torch.float32, chunk=64, new_tokens=2, repeats=1)
    results = run_latency(plan)
    points = {(point["who"], point["length"]): point for point in results["points"]}
    assert all(point["status"] == "measured" for point in points.values())
    assert [points["baseline", length]["chunk"] for length in (100, 130)] == [None, 64]
    assert results["models"]["baseline"]["kernel"] in ("flash", "cudnn", "efficient")
    assert results["models"]["hybrid"]["decoding"] == "no graph here"
    for who in ("hybrid", "baseline"):
        point = points[who, 130]
        assert point["first_token_times_floor"] == pytest.approx(point["first_token_s"] / point["first_token_floor_s"])


def test_a_prompt_in_chunks_is_the_same_through_the_baselines_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes_module, "HYBRIDS", HYBRIDS)
    config = baseline_config("tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(96, (1, 70))
    with torch.inference_mode():
        expected = model(ids).logits
        model.set_attn_implementation(baseline_module.LOWER_RIGHT)
        cache = DynamicCache(config=config)
        parts = [model(part, **named(cache), use_cache=True).logits for part in ids.split((33, 36, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)


def test_cudnn_takes_the_baselines_prompts_and_not_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    took: list[bool] = []

    def noted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        took.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(baseline_module, "scaled_dot_product_attention", noted)
    k = torch.zeros(1, 2, 9, 8)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        for tokens in (9, 1, 9):
            baseline_module.attend(None, torch.zeros(1, 4, tokens, 8), k, k, None, 1.0)
    assert took == [True, False, True]


# the script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
# an interpreter that keeps its arguments, sees a GPU, and has whatever is asked for but LACKS; parts named in BROKEN fail
INTERPRETER = """#!/bin/sh
case "$1" in
-c)
    case "$2" in *"$LACKS"*) echo "Traceback" >&2; echo "ModuleNotFoundError: No module named '$LACKS'" >&2; exit 1 ;; esac
    exit 0 ;;
esac
echo "$*" >>"$CALLS"
case "$*" in
*"$BROKEN"*) exit 3 ;;
esac
"""
BASH = shutil.which("bash")


def run_script(tmp_path: Path, **variables: str) -> tuple[int, list[list[str]], dict[str, Any]]:
    """Return the script's exit code, the commands it ran and what it wrote."""
    assert BASH is not None
    interpreter, calls = tmp_path / "python", tmp_path / "calls"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    calls.write_text("")
    settings = {
        "PYTHON": str(interpreter),
        "CALLS": str(calls),
        "BROKEN": "nothing at all",
        "LACKS": "nothing at all",
    } | variables
    done = subprocess.run([BASH, SCRIPT, tmp_path / "out"], env=os.environ | settings, capture_output=True, text=True)
    suite = tmp_path / "out" / "gpu.json"
    results = json.loads(suite.read_text()) if suite.exists() else {"said": done.stderr}
    return done.returncode, [line.split() for line in calls.read_text().splitlines()], results


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize("dry", ["", "1"])
def test_the_scripts_commands_are_commands(dry: str, tmp_path: Path) -> None:
    code, calls, results = run_script(tmp_path, DRY=dry)
    assert code == 0 and results["rehearsal"] == bool(dry)
    assert {part["status"] for part in results["parts"]} == {"ran"}
    assert [part["command"].split() for part in results["parts"]] == calls
    tests, *benches = calls
    assert tests[:4] == ["-m", "pytest", "-m", "gpu"]
    assert all((SCRIPT.parents[1] / part).is_dir() for part in tests if part.startswith("tests/"))
    outs = set()
    for module, name, group, verb, *arguments in benches:
        assert (module, name, group) == ("-m", "sala.cli", "bench")
        command = typer.main.get_command(bench_app).commands[verb]  # type: ignore[attr-defined]
        given = command.make_context(verb, arguments).params
        for length in given["length"] or ():
            parse_length(length)
        if verb == "ops":
            shapes_module.attention_shape(given["shape"])
            _chosen(OpsPlan(ops=tuple(given["op"]), phases=tuple(given["phase"]), only=tuple(given["backend"])), CUDA)
        else:
            shapes_module.hybrid_config(given["shape"])
        outs.add(given["out"])
    assert len(outs) == len(benches)


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_a_part_that_fails_takes_nothing_from_the_others(tmp_path: Path) -> None:
    code, calls, results = run_script(tmp_path, PARTS="tests train steps", BROKEN="bench train")
    assert code == 1 and len(calls) == 3
    assert [part["status"] for part in results["parts"]] == ["ran", "failed with exit code 3", "ran"]


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_what_the_budget_has_no_time_for_is_said(tmp_path: Path) -> None:
    code, calls, results = run_script(tmp_path, BUDGET="5", PARTS="train steps")
    assert code == 0 and not calls
    # the script counts whole seconds as they pass
    statuses = [part["status"] for part in results["parts"]]
    assert len(statuses) == 2 and all(re.fullmatch(r"not run: -?\d+ s of the budget were left", s) for s in statuses)


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize("lacking", ["pytest", "hypothesis", "sala.bench"])
def test_an_interpreter_that_lacks_something_runs_nothing(lacking: str, tmp_path: Path) -> None:
    code, calls, results = run_script(tmp_path, LACKS=lacking)
    assert code == 2 and not calls
    assert results["said"].endswith(f"cannot run the measurements: ModuleNotFoundError: No module named {lacking!r}\n")


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    code, calls, results = run_script(tmp_path, PARTS="step")
    assert code == 2 and not calls and "no part step" in results["said"]
