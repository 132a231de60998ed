"""A card says what a model is, how it was made and from what; the hub can read its header."""

import dataclasses
import platform
import re
from typing import Any

import torch
from huggingface_hub import ModelCard

from sala.recipe import load_recipe
from sala.runs.card import model_card, versions
from sala.runs.start import Origin
from sala.train.loop import Progress

RECIPE = load_recipe("smoke").resolved
CONFIG = {
    "model_type": "minicpm_sala",
    "mixer_types": ["lightning-attn", "minicpm4", "lightning-attn", "lightning-attn"],
}


def steps(stage_index: int, done: int | None = None) -> list[dict[str, Any]]:
    stage = RECIPE["stages"][stage_index]
    return [
        dataclasses.asdict(
            Progress(stage["name"], n, stage["steps"], 2.5, 1e-3, 0.5, 64 * n, 9.0, 1.0, stage_index=stage_index)
        )
        for n in range(1, (stage["steps"] if done is None else done) + 1)
    ]


WHOLE = [step for index in range(len(RECIPE["stages"])) for step in steps(index)]


def card(**changes: Any) -> str:
    values = {
        "name": "a-hybrid",
        "recipe": RECIPE,
        "config": CONFIG,
        "parameters": 1_316_736,
        "metrics": WHOLE,
        "data": {"books": "12 documents, 3,456 tokens, sha256 abc"},
        "tokenizer_sha256": "def",
        "versions": {"sala": "0.1.0", "torch": "2.13.0"},
        "teacher": "Qwen/Qwen3-1.7B",
        "base_model": "Qwen/Qwen3-1.7B",
    }
    return model_card(**(values | changes))


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells[2:]}


def test_the_hub_reads_the_header() -> None:
    header = ModelCard(card()).data.to_dict()
    assert header == {
        "base_model": "Qwen/Qwen3-1.7B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sala", "minicpm_sala", "linear-attention", "sparse-attention"],
    }
    assert "base_model" not in ModelCard(card(base_model=None)).data.to_dict()
    full = {**CONFIG, "mixer_types": ["attention", "attention"]}
    assert ModelCard(card(config=full)).data.tags == ["sala", "minicpm_sala"]


def test_a_card_says_what_the_model_is() -> None:
    text = card()
    assert "# a-hybrid" in text
    assert "1,316,736 parameters in 4 layers" in text
    assert "1 of sparse attention (number 1, from 0), 3 of lightning attention" in text
    assert "converted from Qwen/Qwen3-1.7B by the recipe `smoke`" in text


def test_a_card_says_what_the_model_started_from() -> None:
    trained = load_recipe("teacher").resolved
    assert "converted from Qwen/Qwen3-1.7B by" in card()
    assert "random" not in card(teacher=None)
    assert "trained from random weights by" in card(recipe=trained, metrics=[], teacher=None)
    assert "trained further from ./hybrid by" in card(recipe=trained, metrics=[], teacher="./hybrid")


def test_a_card_has_a_row_a_stage_with_its_loss() -> None:
    table = rows(card())
    assert list(table) == [stage["name"] for stage in RECIPE["stages"]]
    for stage in RECIPE["stages"]:
        loss, trains, length, _, _, done, final = table[stage["name"]]
        assert (loss, length, done, final) == (stage["loss"], f"{stage['length']:,}", f"{stage['steps']:,}", "2.5")
        assert trains == ("linear twins" if loss == "align" else stage["trainable"].replace("_", " "))


def test_what_was_frozen_and_the_curve_of_learning_rates_are_told() -> None:
    curve = {"peak": 1e-3, "final": 1e-5, "curve": "cosine", "warmup_steps": 20}
    stage = {**RECIPE["stages"][1], "trainable": "all", "freeze_qk": True, "learning_rate": curve}
    row = rows(card(recipe={**RECIPE, "stages": [stage]}, metrics=[]))[stage["name"]]
    assert row[1] == "all, queries and keys frozen"
    assert row[4] == "0.001 to 1e-05, cosine, 20 steps up"


def test_a_model_in_the_middle_of_its_recipe_says_so() -> None:
    first, second, third = (stage["name"] for stage in RECIPE["stages"])
    text = card(metrics=[*steps(0), *steps(1, done=1)])
    assert "not finished" in text
    assert rows(text)[first][-1] == "2.5"
    assert rows(text)[second][-2:] == [f"1 of {RECIPE['stages'][1]['steps']:,}", "2.5"]
    assert rows(text)[third][-1] == "not begun"
    assert "not finished" in card(metrics=[])
    assert "not finished" not in card()


def test_data_versions_and_seed_are_told() -> None:
    text = card(recipe={**RECIPE, "seed": 7})
    for fact in ("- books: 12 documents, 3,456 tokens, sha256 abc", "tokenizer: sha256 def", "torch 2.13.0; seed 7."):
        assert fact in text
    assert versions()["torch"] == torch.__version__
    assert versions()["Python"] == platform.python_version()
    assert set(versions()) == {"sala", "torch", "transformers", "Python"}


def test_the_longest_window_that_was_trained_is_the_limit_that_is_told() -> None:
    lengths = [stage["length"] for stage in RECIPE["stages"]]
    assert f"at most {max(lengths):,} tokens" in card()
    assert f"at most {lengths[0]:,} tokens" in card(metrics=steps(0))
    assert "nothing is known" not in card(metrics=[])


def test_the_code_of_a_card_runs() -> None:
    code = re.search(r"```python\n(.*?)```", card(name="embedded"), re.DOTALL)
    assert code is not None
    from sala.model.checkpoint import BUILTIN

    exec(code[1].replace('"embedded"', repr(str(BUILTIN["embedded-hybrid"]))), {})


def test_what_the_recipe_says_for_the_hub_goes_first() -> None:
    said = {"license": "mit", "datasets": ["me/text"], "base_model": None, "language": ["en"]}
    text = card(recipe=RECIPE | {"card": said}, license="apache-2.0")
    header = ModelCard(text).data.to_dict()
    assert (header["license"], header["datasets"], header["language"]) == ("mit", ["me/text"], ["en"])
    assert header["base_model"] == "Qwen/Qwen3-1.7B" and "The licence is stated as mit" in text
    assert ModelCard(card(license="apache-2.0")).data.license == "apache-2.0"


def test_a_fetched_teacher_is_known_on_the_hub() -> None:
    origin = Origin.of("smollm2-135m-instruct")
    assert (origin.base_model, origin.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
