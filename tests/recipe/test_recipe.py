"""Recipes are strict: what is accepted does something, what is wrong is named."""

from pathlib import Path

import pytest
import yaml

from sala.errors import RecipeError
from sala.recipe import ConversionRecipe, TrainingRecipe, load_recipe, override, parse_recipe, recipe_names

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
        (changed(TRAINING, "stages.0.steps=yes"), r"stages\.0 \('first'\)\.steps: true and false are no value"),
        (changed(TRAINING, "stages.0.micro_batch=on"), r"micro_batch: true and false are no value"),
        (changed(TRAINING, "stages.0.learning_rate.peak=true"), r"peak: true and false are no value"),
        (changed(TRAINING, "stages.0.optimizer.betas=[1.5, 0.9]"), r"betas\.0: .*less than 1, got 1\.5"),
        (changed(TRAINING, "optimizer.betas=[0.9, -0.5]"), r"betas\.1: .*greater than or equal to 0, got -0\.5"),
        (changed(TRAINING, f"seed={2**64}"), r"seed: .*less than 18446744073709551616"),
        (changed(TRAINING, "stages.0.loss=distill"), r"needs a teacher"),
        (changed(TRAINING, "stages.0.micro_batch=3"), r"batch 2 is not a multiple of micro_batch 3"),
        (changed(TRAINING, "stages.0.clip_per_layer=true"), r"clip_per_layer is for loss 'align'"),
        (changed(TRAINING, "stages.0.weighted=true"), r"weighted is for loss 'distill'"),
        (changed(CONVERSION, "stages.0.logits_scaling=true"), r"needs conversion\.logits_scaling"),
        (changed(TRAINING, "optimizer.momentum=0.9"), r"no effect with kind 'adamw'"),
        (changed(TRAINING, "stages.0.learning_rate.curve=cosine"), r"needs 'final'"),
        (changed(CONVERSION, "conversion.keep.count=2"), r"give one of fraction, count, layers"),
        (changed(CONVERSION, "conversion.keep.method=none"), r"fraction has no effect with method 'none'"),
        (
            changed(CONVERSION, "conversion.keep.method=uniform", "conversion.keep.epsilon=0.1"),
            r"epsilon has no effect with method 'uniform'",
        ),
        ([], r"list, not a mapping"),
        (
            TRAINING | {"stages": [TRAINING["stages"][0] | {"tokens": 48}]},
            r"give one of steps, tokens; given: steps, tokens",
        ),
        (changed(TRAINING, "stages.0.batch=null"), r"give one of batch, batch_tokens; given: none"),
        (changed(TRAINING, "stages.0.tokns=48"), r"unknown key 'tokns'; did you mean 'tokens'"),
        (
            changed(TRAINING, "stages.0.steps=null", "stages.0.tokens=100"),
            r"tokens 100 is not a multiple of 2 x 8 tokens; expected 96 \(steps 6\) or 112 \(steps 7\)",
        ),
        (
            changed(TRAINING, "stages.0.batch=null", "stages.0.batch_tokens=3"),
            r"batch_tokens 3 is not a multiple of 8 tokens; expected 8 \(batch 1\)",
        ),
        (changed(TRAINING, "stages.0.batch=null", "stages.0.batch_tokens=1e3"), r"a whole number above 0, got '1e3'"),
        (changed(TRAINING, "stages.0.micro_batch=3"), r"expected one of 1, 2"),
        (changed(TRAINING, "stages.0.batch=36", "stages.0.micro_batch=5"), r"one of 1, 2, 3, 4, 6, 9, 12, 18, 36$"),
        (changed(TRAINING, "stages.0.mesh.dp_shard=3"), r"2 windows a batch do not divide over 3 .*one of 1, 2"),
        (
            changed(TRAINING, "mesh.cp=3"),
            r"8 tokens do not divide over 3 context-parallel ranks; expected 6 or 9",
        ),
        (
            changed(TRAINING, "stages.0.micro_batch=2", "mesh.dp_shard=2"),
            r"1 windows of each rank are not a multiple of micro_batch 2; expected one of 1",
        ),
        (changed(TRAINING, "stages.0.data.text=0"), r"text has weight 0 throughout"),
        (changed(TRAINING, "stages.0.data.text=-1"), r"a weight is a number, or a list.*got -1"),
        (changed(TRAINING, "stages.0.data.text=[1]"), r"a weight is a number, or a list.*got \[1\]"),
        (changed(TRAINING, "stages.0.data.text=[1, 0, 1]"), r"data: all weights are 0 at 50% of the stage"),
        (changed(TRAINING, "precision=bf16"), r"precision: .*'float32' or 'bfloat16'"),
        (
            changed(CONVERSION, "stages.0.loss=align", "stages.0.activation_checkpointing=true"),
            r"activation_checkpointing has no effect with loss 'align'",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(values: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        parse_recipe(values)
    assert "\n" not in str(error.value)


def test_a_row_in_tokens_is_the_row_in_steps_and_windows(tmp_path: Path) -> None:
    plain = changed(TRAINING)
    written = changed(
        TRAINING, "stages.0.steps=null", "stages.0.batch=null", "stages.0.tokens=48", "stages.0.batch_tokens=16"
    )
    assert parse_recipe(written) == parse_recipe(plain)
    parse_recipe(written).save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == parse_recipe(plain)


# tokens and batches as the papers print them: HALO (table of stages), MiniCPM-SALA (Table 1)
PUBLISHED_STEPS = {
    "halo-qwen3-1.7b": {"align": 20_000, "distill": 20_000, "long": 500},
    "minicpm-sala": {
        "stable": ("314.6B", "7.8M", 40_300),
        "short-decay": ("1006.6B", "7.8M", 129_000),
        "long-32k": ("102.2B", "7.8M", 13_100),
        "long-160k": ("62.9B", "9.8M", 6_400),
        "long-520k": ("50.6B", "10.1M", 5_000),
        "sft-64k": ("204.5B", "15.7M", 13_000),
        "sft-140k": ("213.3B", "17.8M", 12_000),
    },
}


def test_halo_has_its_published_steps() -> None:
    stages = {stage.name: stage.steps for stage in load_recipe("halo-qwen3-1.7b").stages}
    assert stages == PUBLISHED_STEPS["halo-qwen3-1.7b"]
    # 8 GPUs x windows of a GPU x windows accumulated
    assert [stage.batch for stage in load_recipe("halo-qwen3-1.7b").stages] == [8 * 4, 8 * 12, 8 * 16]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_in_the_package_runs_on_one_number_of_ranks(name: str) -> None:
    recipe = load_recipe(name)
    assert len({recipe.mesh_of(stage).ranks for stage in recipe.stages}) == 1


def test_a_mesh_is_made_for_the_processes_that_run() -> None:
    recipe = load_recipe("halo-small")
    assert [recipe.mesh_of(stage).ranks for stage in recipe.stages] == [1, 1, 1]
    on_sixteen = recipe.on_ranks(16)
    assert [on_sixteen.mesh_of(stage).ranks for stage in on_sixteen.stages] == [16, 16, 16]
    # of 8 long windows each is shared by two
    assert [on_sixteen.mesh_of(stage).cp for stage in on_sixteen.stages] == [2, 1, 2]
    with pytest.raises(
        RecipeError, match=r"stage 'align': 32 windows of 512 tokens divide over no mesh of 7 processes"
    ):
        recipe.on_ranks(7)


def test_an_override_takes_the_place_of_a_row_in_tokens() -> None:
    settings = ("stages.align.steps=100", "stages.0.batch=64", "stages.long.tokens=209_715_200")
    align, _, long = load_recipe("halo-qwen3-1.7b", settings).stages
    assert (align.steps, align.batch, long.steps) == (100, 64, 100)
    assert load_recipe("smoke", ["stages.align.tokens=640"]).stages[0].steps == 5


def test_minicpm_sala_prints_as_its_table() -> None:
    stages = {stage.name: stage for stage in load_recipe("minicpm-sala").stages}
    for name, (tokens, batch, steps) in PUBLISHED_STEPS["minicpm-sala"].items():
        stage = stages[name]
        assert f"{stage.tokens / 1e9:.1f}B" == tokens
        # 7.86M stands as 7.8M there, 17.78M as 17.8M
        assert (
            f"{int(stage.batch * stage.length / 1e5) / 10}M" == batch
            or f"{stage.batch * stage.length / 1e6:.1f}M" == batch
        )
        # the published tokens over the published batch, both rounded
        assert stage.steps == pytest.approx(steps, rel=0.01)
        assert stage.steps % 100 == 0
    assert f"{(stages['align'].tokens + stages['distill'].tokens) / 1e9:.1f}B" == "1.3B"
    assert f"{sum(stage.tokens for stage in stages.values()) / 1e12:.2f}T" == "1.96T"
    rates = [
        (s.learning_rate.at(s.learning_rate.warmup_steps, s.steps), s.learning_rate.at(s.steps - 1, s.steps))
        for name, s in stages.items()
        if name in PUBLISHED_STEPS["minicpm-sala"]
    ]
    assert rates == [
        pytest.approx(ends)
        for ends in (
            (7.5e-3, 7.5e-3),
            (7.5e-3, 3.75e-4),
            (3e-4, 2e-4),
            (2e-4, 1e-4),
            (1e-4, 3.75e-5),
            (1e-3, 1e-4),
            (1e-3, 1e-4),
        )
    ]
    assert [name for name, stage in stages.items() if stage.sparse] == list(stages)[4:]


def test_weights_are_straight_between_their_points() -> None:
    recipe = parse_recipe(changed(TRAINING, "stages.0.steps=5", "stages.0.data={text: [0.0, 1.0, 0.5], code: 0.5}"))
    weights = [recipe.stages[0].weights_at(step) for step in range(5)]
    assert [row["text"] for row in weights] == [0.0, 0.5, 1.0, 0.75, 0.5]
    assert {row["code"] for row in weights} == {0.5}


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
        ("stages.0.steps=[", "the value is not YAML: while parsing"),
        ("stages.0.data={{text}: 1}", "the value is not YAML: .*unhashable key"),
        ("stages.0.data={text: 1, text: 2}", "the value is not YAML: key 'text' stands twice"),
        ("stages.0.steps=2026-11-31", "the value is not YAML: day is out of range"),
        ("stages.0.data=" + "[" * 2000, "the value is not YAML: maximum recursion depth"),
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


def test_a_row_may_start_from_another_one(tmp_path: Path) -> None:
    row = yaml.safe_dump(STAGE, default_flow_style=True).strip()
    (tmp_path / "rows.yaml").write_text(
        f"name: two\nstages:\n  - &row {row}\n  - {{<<: *row, name: second, seed: 1}}\n"
    )
    with pytest.raises(RecipeError, match=r"stages\.1 \('second'\): unknown key 'seed'"):
        load_recipe(tmp_path / "rows.yaml")
    (tmp_path / "rows.yaml").write_text(f"name: two\nstages:\n  - &row {row}\n  - {{<<: *row, name: second}}\n")
    first, second = load_recipe(tmp_path / "rows.yaml").stages
    assert second == first.model_copy(update={"name": "second"})


def test_a_file_without_an_ending_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text(yaml.safe_dump(TRAINING))
    monkeypatch.chdir(tmp_path)
    assert load_recipe("./mine") == parse_recipe(TRAINING)
