"""`sala bench` as a user calls it."""

import json

import pytest

import sala.bench.device
import sala.bench.ops
import sala.bench.pair
from sala.bench.ceilings import Ceilings


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    speeds = {"float32": 1e11, "bfloat16": 2e11}
    for module in (sala.bench.ops, sala.bench.pair):
        monkeypatch.setattr(module, "measure_ceilings", lambda timer, dtype: Ceilings(speeds, 3e10, 2e10))
    monkeypatch.setattr(sala.bench.device, "FLUSH_BYTES", 1024)


def test_ops_prints_a_table_and_writes_what_it_measured(sala, tmp_path):
    out = tmp_path / "ops.json"
    options = ("--shape", "small-32x4", "--length", "1K", "--repeats", "1", "--dtype", "float32", "--backend", "eager")
    outcome = sala("bench", "ops", *options, "--op", "dense", "--op", "infllm", "--out", out)
    assert outcome.code == 0
    for fact in ("small-32x4, float32", "infllm prefill", "dense step", "sdpa", "x floor", "x SDPA", "1K"):
        assert fact in outcome.out
    assert "nothing is selected" not in outcome.out
    results = json.loads(out.read_text())
    assert results["kind"] == "ops"
    assert results["settings"]["dtype"] == "float32"
    assert results["environment"]["versions"]["torch"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("ops", "--shape", "small"), "no shape 'small'"),
        (("ops", "--length", "long"), "512, 16K or 1M"),
        (("ops", "--dtype", "bf16"), "did you mean 'bfloat16'"),
        (("ops", "--op", "infllms"), "did you mean 'infllm'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(options, message, sala):
    outcome = sala("bench", *options)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(("verb", "work"), [("ops", "run_ops"), ("latency", "run_latency"), ("train", "run_train")])
def test_a_file_that_cannot_be_written_is_told_before_the_measuring(verb, work, sala, tmp_path, monkeypatch):
    monkeypatch.setattr(f"sala.bench.{work}", lambda *_, **__: pytest.fail("something was measured"))
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path / "file" / "results.json", "Not a directory"),
        (tmp_path / "file" / "below" / "results.json", "Not a directory"),
        (tmp_path, "Is a directory"),
    ):
        outcome = sala("bench", verb, "--out", out)
        assert (outcome.code, outcome.err) == (2, f"sala: '{out}' cannot be written: {message}\n")


def test_latency_prints_a_table_and_writes_what_it_measured(sala, tmp_path):
    out = tmp_path / "latency.json"
    options = ("--shape", "sala-10m", "--length", "64", "--repeats", "1", "--new-tokens", "1", "--dtype", "float32")
    outcome = sala("bench", "latency", *options, "--out", out)
    assert outcome.code == 0
    for fact in ("sala-10m-full-attention", "parameters", "first token", "tokens/s", "cache"):
        assert fact in outcome.out
    results = json.loads(out.read_text())
    assert results["kind"] == "latency"
    assert [point["status"] for point in results["points"]] == ["measured", "measured"]


def test_report_prints_markdown_and_names_its_plots(sala, tmp_path):
    options = ("--shape", "small-32x4", "--length", "1K", "--repeats", "1", "--op", "dense", "--phase", "step")
    assert sala("bench", "ops", *options, "--out", tmp_path / "ops.json").code == 0
    outcome = sala("bench", "report", tmp_path)
    assert outcome.code == 0
    assert outcome.out.startswith("| file | what |")
    assert outcome.err.splitlines() == [str(tmp_path / "ops-ratios.png")]
    assert (tmp_path / "ops-ratios.png").is_file()
