"""Recipes are strict: what is accepted does something, what is wrong is named."""

from pathlib import Path

import pytest
import yaml

from sala.errors import RecipeError
from sala.train.recipe import ConversionRecipe, TrainingRecipe, load_recipe, override, parse_recipe, recipe_names

STAGE = {
    "name": "first",
    "loss": "next_token",
    "length": 8,
    "batch": 2,
    "steps": 3,
    "learning_rate": {"peak": 1e-3},
    "data": {"text": 1},
}
TRAINING = {"name": "tiny", "model": {"hidden_size": 8}, "stages": [STAGE]}
CONVERSION = {"name": "tiny", "conversion": {"keep": {"fraction": 0.25}}, "stages": [STAGE]}


def changed(values: dict, *settings: str) -> dict:
    return override(yaml.safe_load(yaml.safe_dump(values)), settings)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_in_the_package_is_valid_and_reads_back(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    recipe.save(tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.name == name
    assert again.resolved == recipe.resolved


def test_the_kind_follows_from_the_content() -> None:
    assert isinstance(parse_recipe(TRAINING), TrainingRecipe)
    assert isinstance(parse_recipe(CONVERSION), ConversionRecipe)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(TRAINING, "stages.0.lenght=3"), r"stages\.0 \('first'\): unknown key 'lenght'; did you mean 'length'"),
        (
            changed(TRAINING, "stages.first.learning_rate.peek=1"),
            r"learning_rate: unknown key 'peek'; did you mean 'peak'",
        ),
        (
            changed(CONVERSION, "conversion.keep.methd=halo"),
            r"conversion\.keep: unknown key 'methd'; did you mean 'method'",
        ),
        (changed(CONVERSION, "conversion.gate_init=opne"), r"conversion\.gate_init: .*'random' or 'open', got 'opne'"),
        (changed(TRAINING, "stages.0.steps=0"), r"stages\.0 \('first'\)\.steps: .*greater than 0, got 0"),
        (changed(TRAINING, "stages.0.loss=distill"), r"needs a teacher"),
        (changed(TRAINING, "stages.0.micro_batch=3"), r"batch 2 is not a multiple of micro_batch 3"),
        (changed(TRAINING, "stages.0.clip_per_layer=true"), r"clip_per_layer is for loss 'align'"),
        (changed(TRAINING, "stages.0.weighted=true"), r"weighted is for loss 'distill'"),
        (changed(CONVERSION, "stages.0.logits_scaling=true"), r"needs conversion\.logits_scaling"),
        (changed(TRAINING, "optimizer.momentum=0.9"), r"no effect with kind 'adamw'"),
        (changed(TRAINING, "stages.0.learning_rate.curve=cosine"), r"needs 'final'"),
        (changed(CONVERSION, "conversion.keep.count=2"), r"give one of fraction, count, layers"),
        (changed(CONVERSION, "conversion.keep.method=none"), r"fraction has no effect with method 'none'"),
        ([], r"list, not a mapping"),
    ],
)
def test_a_mistake_is_named_with_its_place(values: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        parse_recipe(values)
    assert "\n" not in str(error.value)


def test_overrides_reach_stages_by_name_and_by_number() -> None:
    assert changed(TRAINING, "stages.first.steps=7")["stages"][0]["steps"] == 7
    assert changed(TRAINING, "stages.0.learning_rate.peak=2.0e-3")["stages"][0]["learning_rate"]["peak"] == 2e-3
    assert changed(TRAINING, "optimizer.kind=muon")["optimizer"] == {"kind": "muon"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stages.0.steps", "has no '='"),
        ("stages.frist.steps=1", "no entry 'frist'; there are: 0 .'first'.; did you mean 'first'"),
        ("stages.4.steps=1", "no entry '4'"),
        ("name.first=1", "below a plain value"),
    ],
)
def test_an_override_that_reaches_nothing_is_an_error(setting: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        changed(TRAINING, setting)


def test_an_unknown_name_lists_the_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'dmeo'; there are: .*did you mean 'demo'"):
        load_recipe("dmeo")
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("name: tiny\nseed: 1\nseed: 2\n")
    with pytest.raises(RecipeError, match=r"key 'seed' stands twice .*line 3"):
        load_recipe(tmp_path / "twice.yaml")
