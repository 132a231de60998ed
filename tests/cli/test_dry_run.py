"""`sala train --dry-run`: every recipe of the package can be planned, as a table and as JSON."""

import json

import pytest

from sala.recipe import recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_can_be_planned(sala, name) -> None:
    outcome = sala("train", name, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "GPU-hours" in outcome.out and "In all" in outcome.out


def test_the_paper_is_planned_on_a_cluster_of_another_size(sala) -> None:
    plan = json.loads(sala("train", "minicpm-sala", "--dry-run", "--json", "--gpus", "256").out)
    assert {stage["gpus"] for stage in plan["stages"]} == {256}


def test_json_has_what_the_table_shows(sala) -> None:
    plan = json.loads(sala("train", "halo-qwen3-1.7b", "--dry-run", "--json", "--gpu", "a800").out)
    assert [stage["steps"] for stage in plan["stages"]] == [20_000, 20_000, 500]
    assert plan["total"]["tokens"] == sum(stage["tokens"] for stage in plan["stages"]) == 2_359_296_000
    for stage in plan["stages"]:
        flops, memory = stage["flops"], stage["memory_bytes"]
        assert flops.pop("total") == sum(flops.values()) and memory.pop("total") == sum(memory.values())
        assert stage["gpu_hours"] == pytest.approx(sum(flops.values()) / (312e12 * 0.4 * 3600))
        assert stage["gpus"] == 8 and stage["fits"]


def test_a_cluster_of_ones_own(sala) -> None:
    options = ("--gpu", "200", "--memory", "2", "--gpus", "2", "--mfu", "0.25", "--json")
    plan = json.loads(sala("train", "teacher", "--dry-run", *options).out)
    assert plan["cluster"] == {
        "gpu": "200",
        "peak_flops_s": 200e12,
        "memory_bytes": 2 * 2**30,
        "mfu": 0.25,
        "gpus": 2,
    }
    assert {stage["gpus"] for stage in plan["stages"]} == {2}


def test_a_recipe_for_any_teacher_is_planned_with_the_one_given(sala, teacher) -> None:
    mine, embedded = (
        json.loads(sala("train", "smoke", "--dry-run", "--json", *options).out)
        for options in (("--teacher", teacher), ())
    )
    assert mine["parameters"] < embedded["parameters"]
    assert embedded["shape"] == "teacher embedded-teacher"


def test_a_checkpoint_that_is_trained_further_is_planned(sala, teacher) -> None:
    command = ("train", "teacher", "--set", "model=null", "--set", "init={}", "--dry-run", "--json")
    plan = json.loads(sala(*command, "--model", teacher).out)
    assert plan["shape"] == f"model {teacher}"
    assert plan["parameters"] == json.loads(sala("inspect", teacher, "--json").out)["total_parameters"]


def test_names_are_shown_as_they_are(sala) -> None:
    names = ("--set", "name=a [/b]", "--set", "stages.align.name='[align]'")
    outcome = sala("train", "smoke", "--dry-run", *names)
    assert outcome.code == 0 and outcome.out.startswith("a [/b]: ")
    assert outcome.out.count("\n[align] ") == 3


@pytest.mark.parametrize(("name", "gpus"), [("halo-qwen3-1.7b", 1), ("halo-qwen3-1.7b", 4), ("minicpm-sala", 1)])
def test_the_mesh_that_a_plan_asks_for_is_one(sala, name, gpus) -> None:
    plan, told = ("train", name, "--dry-run", "--gpus", gpus), []
    while (outcome := sala(*plan, *told)).code:
        assert "GPUs do not divide into copies of" in outcome.err and len(told) < 40, outcome.err
        advice = outcome.err.partition("one copy over all of them: ")[2].split()
        assert advice
        told += advice
    assert told and "GPU-hours" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--dry-run", "--gpu", "h1000"), "'h1000' is not known"),
        (("demo", "--dry-run", "--gpu", "inf", "--memory", "80"), "expected numbers above 0"),
        (("demo", "--dry-run", "--gpu", "h100", "--memory", "nan"), "expected numbers above 0"),
        (("demo", "--dry-run", "--gpus", "3"), "windows a batch do not divide over 3 data-parallel ranks"),
        (("demo", "--dry-run", "--out", "x"), "--out has no effect with --dry-run"),
        (("demo", "--dry-run", "--keep", "3"), "--keep has no effect with --dry-run"),
        (("demo", "--dry-run", "--model", "embedded-teacher"), "--teacher CHECKPOINT alone"),
        (("teacher", "--dry-run", "--teacher", "embedded-teacher"), "has no teacher"),
        (("teacher", "--dry-run", "--set", "model=null", "--set", "init={}"), "needs --model CHECKPOINT"),
        (("halo-llama", "--dry-run", "--teacher", "embedded-teacher"), "for a teacher with hidden_size = 2048"),
        (("teacher", "--out", "x", "--gpus", "2"), "--gpus is for --dry-run"),
        (("teacher",), "--out is missing"),
    ],
)
def test_what_cannot_be_planned_is_one_line(sala, arguments, message) -> None:
    outcome = sala("train", *arguments)
    assert outcome.code == 2
    assert message in outcome.err and outcome.err.count("\n") == 1
