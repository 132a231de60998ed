"""Training steps are measured through the loop that trains, and what would not fit is said before it is tried."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from sala.bench import TrainPlan, run_train, shapes
from sala.bench import train as module
from sala.bench.ceilings import Ceilings
from sala.bench.shapes import ModelShape
from sala.bench.train import overheads
from sala.errors import InputError
from sala.train.flops import Networks, model_flops

PLAN = TrainPlan(
    shape="tiny",
    lengths=(48,),
    precision="float32",
    tokens=96,
    steps=2,
    warm_up=1,
    compile="off",
    topk=(2, 4),
    blocks_length=130,
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    rows = {"tiny": ModelShape(hidden_size=32, layers=4, heads=2, groups=1, vocab_size=96)}
    monkeypatch.setattr(shapes, "HYBRIDS", rows)
    sparse = {"block_size": 16, "window_size": 32, "kernel_size": 8, "kernel_stride": 4, "dense_len": 32}
    monkeypatch.setattr(shapes, "RELEASED_SPARSE", shapes.RELEASED_SPARSE | sparse | {"topk": 4})
    monkeypatch.setattr(module, "measure_ceilings", lambda timer, dtype: Ceilings({"float32": 1e11}, 3e10, 2e10))
    yield


def test_a_step_of_each_loss_is_measured_and_so_is_memory_by_blocks() -> None:
    said: list[str] = []
    kept: list[int] = []
    results = run_train(PLAN, said.append, lambda results: kept.append(len(results["points"]) + len(results["blocks"])))
    assert not results["failures"]
    assert [(p["loss"], p["length"], p["windows"]) for p in results["points"]] == [
        ("next_token", 48, 2),
        ("distill", 48, 2),
    ]
    for point in results["points"]:
        assert point["status"] == "measured" and not point["activation_checkpointing"]
        assert len(point["step_each_s"]) == len(point["losses"]) == 3  # the warm-up too
        assert point["step_s"] == pytest.approx(sum(point["step_each_s"][1:]) / 2)
        assert point["tokens_s"] == pytest.approx(96 / point["step_s"])
        assert point["times_floor"] == pytest.approx(point["step_s"] * 1e11 / point["model_flops"])
        assert point["mfu"] is None  # of a CPU no peak is known
    one, two = results["points"]
    assert overheads(results["points"]) == {48: pytest.approx(two["step_s"] / one["step_s"])}
    # a teacher's forward pass is work of the loss
    assert two["model_flops"] > 1.2 * one["model_flops"]
    assert one["losses"][-1] < one["losses"][0]  # it trains
    assert [(row["topk"], row["blocks_read"]) for row in results["blocks"]] == [(2, 4), (4, 6)]
    assert kept == [1, 2, 3, 4]


def test_activations_are_made_again_where_they_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, losses=("next_token",), topk=(), tokens=960)
    recipes = [module._recipe(plan, "next_token", 48, checkpointing=on) for on in (False, True)]
    networks = Networks(shapes.hybrid_config("tiny"))
    kept, again = (module.stage_memory(recipe.stages[0], networks, module.Mesh(), recipe).total for recipe in recipes)
    assert again < kept
    monkeypatch.setattr(module, "available_bytes", lambda device: (again + kept) / 2 / module.USABLE)
    (point,) = run_train(plan)["points"]
    assert point["status"] == "measured" and point["activation_checkpointing"]
    assert point["predicted"]["total"] == again
    # utilisation does not count what is computed again
    assert point["model_flops"] == model_flops(recipes[0].stages[0], networks)
    monkeypatch.setattr(module, "available_bytes", lambda device: again / 2)
    (point,) = run_train(plan)["points"]
    assert point["status"] == "OOM" and "predicted" in point["reason"]


def test_a_stage_that_fails_takes_nothing_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module._measure

    def broken(plan: Any, loss: str, *rest: Any) -> Any:
        if loss == "next_token":
            raise RuntimeError("no kernel image")
        return right(plan, loss, *rest)

    monkeypatch.setattr(module, "_measure", broken)
    results = run_train(replace(PLAN, topk=()))
    assert [(f["case"], f["error"]) for f in results["failures"]] == [
        ("tiny next_token", "RuntimeError: no kernel image")
    ]
    assert [point["loss"] for point in results["points"]] == ["distill"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": ("next-token",)}, "did you mean 'next_token'"),
        ({"precision": "bf16"}, "did you mean 'bfloat16'"),
        ({"steps": 0}, "below one"),
        ({"shape": "tinny"}, "did you mean 'tiny'"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_train(replace(PLAN, **change))


def test_windows_are_the_same_at_every_step() -> None:
    recipe = module._recipe(PLAN, "next_token", 48, checkpointing=False)
    feed = module.RandomTokens(96).feed(recipe.stages[0], 0)
    first, second = next(feed), next(feed)
    assert first.input_ids.shape == (2, 48)
    assert torch.equal(first.input_ids, second.input_ids)
