"""Whole runs write whole folders, or nothing."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sala.data import Document, train_tokenizer
from sala.errors import CheckpointError, InputError, RecipeError, SalaError
from sala.model.checkpoint import read_tensors
from sala.model.families import load_config, load_model
from sala.recipe import ConversionRecipe, TrainingRecipe, load_recipe, override, parse_recipe
from sala.runs.checks import require_same_shape
from sala.runs.identity import Finished
from sala.runs.run import Scorers, new_model
from sala.runs.run import run_recipe as train
from sala.runs.stages import sample
from sala.runs.start import Origin
from sala.train.batches import Corpus, StepFeed, WindowBatch, read_corpus

TEXT = "def read(path):\n    return open(path).read()\n" * 40
MODEL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([Document("a.py", TEXT)], vocab_size=300)


@pytest.fixture(scope="module")
def corpus(tokenizer: PreTrainedTokenizerFast) -> Corpus:
    return read_corpus(tokenizer, [Document("a.py", TEXT)])


def training_recipe(**changes: Any) -> TrainingRecipe:
    stage = {
        "name": "short",
        "loss": "next_token",
        "length": 64,
        "batch": 2,
        "steps": 2,
        "learning_rate": {"peak": 1e-3},
        "data": {"text": 1, "noise_retrieval": 1},
    }
    recipe = parse_recipe({"name": "tiny", "compile": "off", "model": MODEL, "stages": [stage | changes]})
    assert isinstance(recipe, TrainingRecipe)
    return recipe


def test_weights_stored_in_bfloat16_are_computed_in_float32(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    recipe = training_recipe().model_copy(update={"stored_as": "bfloat16"})
    model = train(recipe, tmp_path / "run", tokenizer=tokenizer, data=corpus)
    loaded = load_model(tmp_path / "run" / "final")
    halved = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "run" / "final" / "model.safetensors").stat().st_size < 1.2 * halved
    assert loaded.dtype == loaded.config.dtype == model.dtype == torch.float32
    for ours, read in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours.bfloat16().float(), read)


def test_a_finished_run_is_a_checkpoint_with_its_recipe(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    recipe = training_recipe()
    model = train(recipe, tmp_path / "run", tokenizer=tokenizer, data=corpus)
    final = tmp_path / "run" / "final"
    loaded = load_model(final)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.config.vocab_size == len(tokenizer)
    assert PreTrainedTokenizerFast.from_pretrained(final).get_vocab() == tokenizer.get_vocab()
    assert load_recipe(final / "recipe.yaml").resolved == recipe.resolved
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("short", 1), ("short", 2)]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(Finished, match="is finished: its model is .*final") as finished:
        train(recipe, tmp_path / "run", tokenizer=tokenizer, data=corpus)
    assert finished.value.exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(RecipeError, match=r"has seed = 0, this recipe 1"):
        train(recipe.model_copy(update={"seed": 1}), tmp_path / "run", tokenizer=tokenizer, data=corpus)
    other = train_tokenizer([Document("a.py", TEXT[::-1])], vocab_size=300)
    with pytest.raises(InputError, match="started with another tokenizer"):
        train(recipe, tmp_path / "run", tokenizer=other, data=corpus)


def test_a_run_is_a_function_of_its_recipe(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    first, again = (
        train(training_recipe(), tmp_path / name, tokenizer=tokenizer, data=corpus) for name in ("first", "again")
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_recipe_that_cannot_run_leaves_nothing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    with pytest.raises(RecipeError, match="data task 'noise_retreival' is unknown.*did you mean 'noise_retrieval'"):
        train(training_recipe(data={"noise_retreival": 1}), tmp_path / "run", tokenizer=tokenizer, data=corpus)
    recipe = training_recipe()
    with pytest.raises(RecipeError, match=r"model\.hiden_size: unknown key; did you mean 'hidden_size'"):
        train(
            recipe.model_copy(update={"model": {"hiden_size": 8}}), tmp_path / "run", tokenizer=tokenizer, data=corpus
        )
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_of_another_number_of_processes_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    recipe = parse_recipe(training_recipe().resolved | {"mesh": {"dp_shard": 2}})
    with pytest.raises(
        RecipeError, match=r"mesh is of 2 ranks .*and 1 process runs; expected `torchrun --nproc-per-node 2"
    ):
        train(recipe, tmp_path / "run", tokenizer=tokenizer, data=corpus)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_sources_says_what_it_reads(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    said: list[str] = []
    train(training_recipe(), tmp_path / "run", tokenizer=tokenizer, data=corpus, say=said.append)
    assert said[0] == (
        "the recipe names no sources: its 256 tokens are the package's own text and generated tasks "
        f"(Python's standard library, {len(corpus.text):,} tokens)"
    )


@pytest.mark.parametrize("changes", [{"mesh": {"cp": 2}}, {"stages": [{"mesh": {"dp_replicate": 2}}]}])
def test_the_mesh_that_is_told_to_be_right_is(
    changes: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    values = training_recipe().resolved
    values["stages"] = [values["stages"][0] | changes.get("stages", [{}])[0]]
    values |= {"mesh": changes.get("mesh", {})}
    with pytest.raises(RecipeError, match="1 process runs") as refused:
        train(parse_recipe(copy.deepcopy(values)), tmp_path / "run", tokenizer=tokenizer, data=corpus)
    told = str(refused.value).partition("--set '")[2].rstrip("'")
    train(parse_recipe(override(values, [told])), tmp_path / "run", tokenizer=tokenizer, data=corpus)


def test_a_stage_switches_block_selection_on_and_off(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("sala.runs.stages.run_stage", lambda model, *_, **__: seen.append(model.config.mixer_types))
    monkeypatch.setattr("sala.runs.run.read_metrics", lambda folder: [])
    sparse = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 16, "topk": 2, "dense_len": 32}
    fields = {"mixer_types": ["attention", "lightning-attn"], "sparse_config": sparse}
    values = training_recipe().resolved
    stages = [values["stages"][0] | {"name": str(on), "sparse": on} for on in (False, True)]
    recipe = parse_recipe(values | {"model": MODEL | fields, "stages": stages})
    train(recipe, tmp_path / "run", tokenizer=tokenizer, data=corpus)
    assert seen == [["attention", "lightning-attn"], ["minicpm4", "lightning-attn"]]


def test_weights_change_within_a_stage(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    recipe = training_recipe(steps=5, batch=40, data={"text": [1, 0], "noise_retrieval": [0, 1]})
    batch = corpus.batches(recipe.stages[0], seed=0)
    shares = [sum("text" in name for name in batch(step).names) for step in range(5)]
    assert shares[0] == 40 and shares[-1] == 0
    assert shares == sorted(shares, reverse=True) and 5 < shares[2] < 35


def test_a_teacher_of_another_shape_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    teacher = new_model(training_recipe(), tokenizer)
    fields = teacher.config.to_dict()
    require_same_shape(smoke().model_copy(update={"teacher": fields}), teacher.config)
    with pytest.raises(RecipeError, match=r"for a teacher with hidden_size = 2048; this one has 16.*teacher=null"):
        train(
            load_recipe("halo-qwen3-1.7b", ["mesh={}", "precision=float32"]),
            tmp_path / "hybrid",
            model=teacher,
            scorers=Scorers(lambda model: 0.0, lambda model: 0.0),
            tokenizer=tokenizer,
            data=corpus,
        )


def a_teacher(tokenizer: PreTrainedTokenizerFast) -> Any:
    return new_model(training_recipe().model_copy(update={"model": MODEL | {"attn_use_output_gate": False}}), tokenizer)


def never(model: Any) -> float:
    pytest.fail("a conversion began")


def smoke() -> ConversionRecipe:
    recipe = load_recipe("smoke")
    assert isinstance(recipe, ConversionRecipe)
    return recipe


def test_latent_keys_that_cannot_be_frozen_are_refused_before_alignment(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    latents = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    changes = {"mixer_types": ["latent-attention"] * 2, "attn_use_output_gate": False, "head_dim": None}
    model = MODEL | latents | changes
    teacher = new_model(training_recipe().model_copy(update={"model": model}), tokenizer)
    recipe = smoke()
    *first, last = recipe.stages
    frozen = recipe.model_copy(update={"stages": (*first, last.model_copy(update={"freeze_qk": True}))})
    scorers = Scorers(never, never)
    with pytest.raises(SalaError, match="freeze_qk: latent attention makes keys and values in one projection"):
        train(frozen, tmp_path / "run", model=teacher, scorers=scorers, tokenizer=tokenizer, data=corpus)
    assert not (tmp_path / "run").exists()


def test_what_is_measured_on_is_packed_as_what_is_trained_on(corpus: Corpus) -> None:
    padding = torch.zeros(9, 6, dtype=torch.bool)
    padding[1, 4:] = True
    windows = WindowBatch(torch.ones(9, 6).long(), torch.ones(9, 6), ("",) * 9, ((2, 6), (4, 6), *((6,),) * 7), padding)
    measured = sample(smoke(), SimpleNamespace(feed=lambda stage, seed: StepFeed(lambda step: windows)))
    assert measured.cu_seqlens.tolist() == [0, 2, 6, 10, *range(12, 49, 6)]
    assert measured.input_ids.shape == measured.real.shape == (1, 48)
    assert (~measured.real).nonzero()[:, 1].tolist() == [10, 11]
    # windows of text and tasks are sequences of their own
    assert sample(smoke(), corpus).input_ids.shape == (2, smoke().stages[0].length)


@pytest.mark.parametrize(("number", "named"), [(float("nan"), "holds nan"), (float("inf"), "holds infinity")])
def test_weights_that_are_not_finite_are_the_teacher_s(
    number: float, named: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    teacher = a_teacher(tokenizer)
    teacher.model.layers[1].mlp.up_proj.weight.data[3, 0] = number
    scorers = Scorers(never, never)
    given: dict[str, Any] = {"tokenizer": tokenizer, "data": corpus, "origin": Origin("mine")}
    message = f"'mine': tensor 'model.layers.1.mlp.up_proj.weight' {named}; expected finite weights"
    with pytest.raises(CheckpointError, match=f"^the teacher {message}"):
        train(smoke(), tmp_path / "run", model=teacher, scorers=scorers, **given)
    recipe = training_recipe().model_copy(update={"model": None})
    with pytest.raises(CheckpointError, match=f"^the model {message}"):
        train(recipe, tmp_path / "run", model=teacher, **given)
    assert not (tmp_path / "run").exists()


def test_logits_that_are_not_finite_are_the_teacher_s(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    teacher = a_teacher(tokenizer)
    teacher.lm_head.weight.data.fill_(3e38)
    scorers = Scorers(never, never)
    with pytest.raises(
        CheckpointError, match="^the teacher: the weights are finite, and the logits computed in float32"
    ):
        train(smoke(), tmp_path / "run", model=teacher, scorers=scorers, tokenizer=tokenizer, data=corpus)


def test_another_tokenizer_trains_on_text_alone() -> None:
    corpus = Corpus(np.arange(100), None, begin=7)
    stage = SimpleNamespace(name="first", data={"text": 1.0}, length=10, batch=3)
    batch = corpus.batches(stage, seed=0)(4)
    assert batch.input_ids.shape == (3, 10)
    assert (batch.input_ids[:, 0] == 7).all()
    assert (batch.input_ids[:, 1:].diff() == 1).all()
    assert torch.equal(batch.input_ids, corpus.batches(stage, seed=0)(4).input_ids)
    with pytest.raises(RecipeError, match="has no words for generated tasks"):
        corpus.batches(SimpleNamespace(name="first", data={"copy": 1.0}, length=10, batch=3), seed=0)
    with pytest.raises(InputError, match="the text has 100 tokens"):
        corpus.batches(SimpleNamespace(name="first", data={"text": 1.0}, length=200, batch=3), seed=0)


def test_utilisation_is_shown_where_the_peak_is_known(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sala.runs.stages.peak_flops", lambda device, precision: 1e12)
    train(training_recipe(), tmp_path / "run", tokenizer=tokenizer, data=corpus)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["mfu"] < 1 for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_is_trained_further_keeps_the_dtype_it_is_stored_in(
    dtype: torch.dtype, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    recipe = training_recipe()
    new_model(recipe, tokenizer).to(dtype).save_pretrained(tmp_path / "start")
    further = recipe.model_copy(update={"model": None})
    start = load_model(tmp_path / "start", dtype="stored")
    trained = train(further, tmp_path / "run", tokenizer=tokenizer, data=corpus, model=start)
    final = tmp_path / "run" / "final"
    assert trained.dtype == trained.config.dtype == torch.float32
    assert load_model(final).dtype == load_config(final).dtype == dtype
    for name, tensor in read_tensors(final):
        assert torch.equal(tensor, trained.state_dict()[name].to(dtype)), name
