"""The orderings: what is compared, what counts as noise, and that a scale is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_plan import PLAN

from sala.demo.measure import HYBRID_FULL, TEACHER
from sala.demo.orderings import (
    CLAIMS,
    CONSTANT_SCALE,
    LENGTHS,
    NO_SCALE,
    TRIALS,
    VARIANTS,
    orderings_table,
    summarize_orderings,
    verdict,
    with_constant_scale,
)
from sala.demo.trials import run_trials, trial_recipe
from sala.model import MiniCPMSALAConfig, MiniCPMSALAForCausalLM, attention
from sala.model.mixers import reconfigured


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_valid_recipe_of_its_own(name: str) -> None:
    base, changed = (trial_recipe(TRIALS[f"{variant}-1"], "orderings") for variant in ("base", name))
    assert (changed.seed, changed == base) == (1, name == "base")


def test_every_claim_is_about_variants_that_are_run() -> None:
    assert {who.variant for claim in CLAIMS for who in (claim.upper, claim.lower)} == set(VARIANTS)
    assert {claim.ordering for claim in CLAIMS} == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("qk_norm", [True, False])
def test_a_constant_scale_multiplies_the_softmax_layers_logits(qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = MiniCPMSALAConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        mixer_types=["attention", "lightning-attn"],
        attention_qk_norm=qk_norm,
        qkv_bias=True,
        attn_logits_scaling=64,
    )
    model = MiniCPMSALAForCausalLM(config).eval()
    tokens = torch.randint(0, 32, (1, 20))
    own = model(tokens).logits
    scaled = with_constant_scale(model, 3.0)(tokens).logits
    monkeypatch.setattr(attention, "logits_scale", lambda positions_BT, base: torch.full(positions_BT.shape, 3.0))
    torch.testing.assert_close(scaled, model(tokens).logits)
    assert not torch.allclose(scaled, reconfigured(model, attn_logits_scaling=None)(tokens).logits, atol=1e-4)
    monkeypatch.undo()
    assert torch.equal(model(tokens).logits, own)


@pytest.mark.parametrize(
    ("relation", "difference", "expected"),
    [
        ("above", 0.3, "holds"),
        ("above", 0.05, "within noise"),
        ("above", -0.3, "does not hold"),
        ("not below", 0.0, "holds"),
        ("not below", -0.3, "does not hold"),
        ("alike", 0.01, "holds"),
        ("alike", -0.11, "within noise"),
        ("alike", 0.3, "does not hold"),
    ],
)
def test_a_verdict_takes_the_noise_into_account(relation: str, difference: float, expected: str) -> None:
    assert verdict(relation, difference, noise=0.1, alike=0.02) == expected


def run_of(variant: str, seed: int, recall: float, loss: float) -> dict[str, Any]:
    """A run whose figures do not depend on the length, but for rotary positions on the kept layer."""
    models = (HYBRID_FULL, CONSTANT_SCALE, NO_SCALE) if variant == "base" else (HYBRID_FULL,)
    return {
        "name": f"{variant}-{seed}",
        "about": "",
        "conversion": {"kept": [1]},
        "hybrid": {"mixer_types": ["lightning-attn", "attention"]},
        "recipe": {"seed": seed},
        "teacher": {"name": "teacher"},
        "seconds": {},
        "environment": {"commit": None, "hardware": {}, "command": ""},
        "retrieval": [
            {
                "model": model,
                "haystack": haystack,
                "length": length,
                "questions": 128,
                "accuracy": 0.1 if variant == "rope-kept" and length > 2048 else recall,
                "depths": [],
            }
            for model in models
            for haystack in ("text", "noise")
            for length in LENGTHS
        ],
        "language": [{"model": model, "length": 512, "text": {"loss": loss}} for model in models],
        "cache": [
            {"model": TEACHER, "bytes_a_token": 4096.0, "bytes_at_any_length": 0.0},
            {"model": HYBRID_FULL, "bytes_a_token": 2048.0, "bytes_at_any_length": 512.0},
        ],
    }


def test_orderings_are_told_with_their_spread_and_only_over_seeds() -> None:
    first = [run_of("base", 0, 0.9, 3.0), run_of("rope-kept", 0, 0.9, 3.0), run_of("all-linear", 0, 0.0, 3.4)]
    assert summarize_orderings(first)["comparisons"] == []
    second = [run_of("base", 1, 0.94, 3.02), run_of("rope-kept", 1, 0.9, 3.0), run_of("all-linear", 1, 0.0, 3.4)]
    summary = summarize_orderings(first + second)
    told = {row["says"]: (row["holds"], row["within noise"], row["does not hold"]) for row in summary["orderings"]}
    assert told["rotary positions on the kept layer do no harm where it was trained"] == (4, 0, 0)
    assert told["and collapse beyond"] == (4, 0, 0)
    assert told["a constant is better than no scale"] == (0, 4, 0)
    assert told["all linear predicts short text as well"] == (0, 0, 1)
    row = next(row for row in summary["comparisons"] if row["says"] == "and collapse beyond")
    assert row["upper"]["values"] == [0.9, 0.94]
    assert row["upper"]["spread"] == pytest.approx(0.04 / 2**0.5)
    assert row["difference"] == pytest.approx(0.82)
    assert (summary["cache"]["ratio"], summary["cache"]["expected"], summary["cache"]["verdict"]) == (0.5, 0.5, "holds")
    assert "| base: hybrid, no logit scale | 0.92 ± 0.03 |" in orderings_table(summary)


def test_a_hybrid_is_asked_with_every_scale_and_its_cache_is_measured(
    tmp_path: Path, teacher: Path, few_documents: None
) -> None:
    summary = run_trials(
        tmp_path,
        tmp_path / "out.json",
        only=["base-0"],
        plan=PLAN,
        teacher=str(teacher),
        trials=TRIALS,
        summary_of=summarize_orderings,
    )
    run = summary["runs"]["base-0"]
    assert {point["model"] for point in run["points"]} == {TEACHER, HYBRID_FULL, CONSTANT_SCALE, NO_SCALE}
    assert {point["length"] for point in run["points"]} == set(PLAN.lengths)
    cache = summary["cache"]
    assert cache["ratio"] == cache["expected"] == 1 / 4
    # three states of 2 heads of 8 x 8 float32
    assert [row["bytes_at_any_length"] for row in cache["rows"]] == [0, 3 * 2 * 8 * 8 * 4]
