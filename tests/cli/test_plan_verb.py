"""`sala plan` as a user calls it."""

import json
import re

import pytest
import torch

from sala.model.families import load_model


def test_a_plan_shows_bf16_and_int4_side_by_side(sala):
    outcome = sala("plan", "--model", "minicpm-sala-9b", "--memory", "16GiB", "--length", "512K")
    assert outcome.code == 0
    for fact in ("bf16", "int4", "process", "weights", "cache", "working", "total", "longest that fits"):
        assert fact in outcome.out
    fits = next(line for line in outcome.out.splitlines() if line.strip().startswith("fits"))
    assert fits.split() == ["fits", "no", "yes"]


def test_a_gpu_is_planned_whether_or_not_there_is_one(sala):
    outcome = sala("plan", "--model", "minicpm-sala-9b", "--device", "cuda", "--memory", "80GiB", "--length", "1M")
    assert outcome.code == 0
    for fact in ("80.0 GiB of GPU memory", "keys and values take 8,192 bytes a token", "counted", "not measured"):
        assert fact in outcome.out
    rows = [re.split(r"\s{2,}", line.strip()) for line in outcome.out.splitlines()]
    assert ["keys and values", "8.0 GiB", "8.0 GiB"] in rows and ["states", "48 MiB", "48 MiB"] in rows


def test_a_gpu_without_the_kernels_is_planned_for_plain_torch(sala, monkeypatch):
    def working() -> int:
        outcome = sala(
            "plan", "--model", "sala-1b", "--device", "cuda", "--memory", "80GiB", "--dtype", "bf16", "--json"
        )
        return json.loads(outcome.out)["plans"][0]["working"]

    with_kernels = working()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("sala.ops.gpu._unavailable", lambda interpreted: "Triton is not installed")
    assert working() > with_kernels
    outcome = sala("plan", "--model", "sala-1b", "--device", "cuda", "--memory", "80GiB")
    assert "what plain torch asks, at most (Triton is not installed)" in outcome.out


def test_json_has_the_numbers_of_a_checkpoint(sala, hybrid):
    outcome = sala("plan", "--model", hybrid, "--memory", "1GiB", "--length", "1K", "--dtype", "fp32", "--json")
    (row,) = json.loads(outcome.out)["plans"]
    assert (row["precision"], row["length"], row["available"]) == ("fp32", 1024, 2**30)
    assert row["total"] == row["process"] + row["weights"] + row["cache"] + row["working"]
    assert row["fits"] is (row["total"] <= 2**30)


def test_a_model_of_the_package_is_planned_on_this_machine_s_memory(sala):
    outcome = sala("plan", "--model", "embedded-hybrid", "--length", "16K", "--json")
    assert [row["precision"] for row in json.loads(outcome.out)["plans"]] == ["fp32", "int4"]


def test_a_checkpoint_is_planned_in_the_dtype_that_it_is_stored_in(sala, teacher, tmp_path):
    load_model(teacher).to(torch.float16).save_pretrained(tmp_path / "half")
    outcome = sala("plan", "--model", tmp_path / "half", "--length", "16K", "--json")
    assert [row["precision"] for row in json.loads(outcome.out)["plans"]] == ["fp16", "int4"]
    assert json.loads(sala("inspect", tmp_path / "half", "--json").out)["dtype"] == "float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "./nowhere"), "no folder"),
        (("--model", "sala-10m", "--memory", "32G"), "32GiB, 24GB"),
        (("--model", "sala-10m", "--length", "long"), "512, 16K or 1M"),
        (("--model", "sala-10m", "--device", "tpu"), "device 'tpu' is not on this machine"),
        (("--model", "sala-10m", "--dtype", "int8"), "expected one of bf16"),
    ],
)
def test_what_cannot_be_planned_is_one_line(options, message, sala):
    outcome = sala("plan", *options)
    assert outcome.code == 2
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1
