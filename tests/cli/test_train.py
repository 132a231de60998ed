"""`sala train` stops, goes on and exports; who speaks when many processes fail."""

import math
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sala.cli.progress import Display
from sala.data import Document, train_tokenizer
from sala.runs.checkpoint import Checkpoints
from sala.runs.record import Record

TEXT = "def read(path):\n    return open(path).read()\n" * 40


@pytest.fixture
def little_text(monkeypatch):
    monkeypatch.setattr("sala.train.batches.library_documents", lambda split: [Document("a.py", TEXT)])


MODEL = "{hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2, head_dim: 8}"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"name: tiny\ncompile: off\nmodel: {MODEL}\nstages:\n  - {{name: short, loss: next_token, length: 64, batch: 2, "
        "steps: 4, learning_rate: {peak: 1.0e-3}, data: {text: 1}}\n"
    )
    return path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_in_one_line_and_the_same_command_goes_on(
    number, code, sala, recipe, tmp_path, little_text, monkeypatch
):
    write = Record.__call__

    def interrupted(self, progress):
        write(self, progress)
        if progress.step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Record, "__call__", interrupted)
    outcome = sala("train", recipe, "--out", tmp_path / "run")
    assert outcome.code == code
    assert outcome.err.splitlines()[-1].startswith("sala: stopped after step 2 of stage 'short', saved in ")
    monkeypatch.undo()
    monkeypatch.setattr("sala.train.batches.library_documents", lambda split: [Document("a.py", TEXT)])
    assert sala("train", "export", tmp_path / "run", "--out", tmp_path / "model").code == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()
    outcome = sala("train", recipe, "--out", tmp_path / "run")
    assert outcome.code == 0 and outcome.out.strip() == str(tmp_path / "run" / "final")
    outcome = sala("train", recipe, "--out", tmp_path / "run")
    assert outcome.code == 0 and outcome.out.strip() == str(tmp_path / "run" / "final")
    assert outcome.err == f"the run in '{tmp_path}/run' is finished: its model is '{tmp_path}/run/final'\n"


def test_a_checkpoint_that_a_run_replaces_while_it_is_exported_is_one_line(
    sala, recipe, tmp_path, little_text, monkeypatch
):
    assert sala("train", recipe, "--out", tmp_path / "run").code == 0
    (tmp_path / "there").mkdir()
    export = ("train", "export", tmp_path / "run", "--out")
    outcome = sala(*export, tmp_path / "there")
    assert outcome.code == 2 and "exists already" in outcome.err
    read = Checkpoints.load

    def late(self, saved, state):
        saved.folder.rename(saved.folder.with_name(f".deleted-{saved.folder.name}"))
        read(self, saved, state)

    monkeypatch.setattr(Checkpoints, "load", late)
    outcome = sala(*export, tmp_path / "model")
    assert outcome.code == 2 and "replaced" in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(sala, recipe, tmp_path, little_text, monkeypatch):
    assert sala("train", recipe, "--out", tmp_path / "run", "--set", "stages.short.steps=1").code == 0
    (tmp_path / "file").touch()
    monkeypatch.setattr(Checkpoints, "load", lambda *_: pytest.fail("a model was made"))
    monkeypatch.setattr("sala.runs.stages.run_stage", lambda *_, **__: pytest.fail("a stage was trained"))
    monkeypatch.setattr("sala.data.encode._texts", lambda *_: pytest.fail("a document was read"))
    words = ("--tokenizer", "embedded-teacher")
    nowhere = Path("/proc/absent/below/out")
    for out in (
        tmp_path / "file" / "out",
        tmp_path / "file" / "below" / "out",
        *([nowhere] if os.path.isdir("/proc") else []),
    ):
        for verb in (
            ("train", recipe),
            ("convert", "--teacher", "embedded-teacher", "--recipe", "smoke"),
            ("train", "export", tmp_path / "run"),
            ("data", recipe, *words),
            ("demo", "--quick"),
        ):
            outcome = sala(*verb, "--out", out)
            message = "No such file" if out == nowhere else "Not a directory"
            assert outcome.code == 2 and message in outcome.err, outcome
            assert outcome.err.count("\n") == 1


def test_the_model_is_named_below_the_display(sala, recipe, tmp_path, little_text, monkeypatch):
    events = []
    leave = Display.__exit__
    monkeypatch.setattr(Display, "__exit__", lambda *of: (events.append("display"), leave(*of))[1])
    monkeypatch.setattr("typer.echo", events.append)
    assert sala("train", recipe, "--out", tmp_path / "run", "--set", "stages.short.steps=1").code == 0
    assert events == ["display", tmp_path / "run" / "final"]


def test_what_has_no_model_yet_is_not_exported(sala, tmp_path):
    outcome = sala("train", "export", tmp_path, "--out", tmp_path / "model")
    assert outcome.code == 2 and "is no folder of a run" in outcome.err
    (tmp_path / "recipe.yaml").write_text(f"name: a\nmodel: {MODEL}\nstages: [{STAGE}]\n")
    outcome = sala("train", "export", tmp_path, "--out", tmp_path / "model")
    assert outcome.code == 2 and "has saved nothing yet" in outcome.err
    assert not (tmp_path / "model").exists()


STAGE = "{name: a, loss: next_token, length: 64, batch: 2, steps: 4, learning_rate: {peak: 1.0e-3}, data: {text: 1}}"


def test_options_without_effect_are_refused(sala, tmp_path, little_text):
    train = ("train", "teacher", "--out", tmp_path / "run")
    assert "no effect with --save-every" in sala(*train, "--save-every", 3, "--save-minutes", 2).err
    assert "--gpus is for --dry-run" in sala(*train, "--gpus", 3).err
    outcome = sala(*train, "--set", "stages=[" + STAGE + "," + STAGE + "]")
    assert outcome.code == 2 and "a stage before it is called 'a' too" in outcome.err
    outcome = sala(*train, "--set", "mesh.dp_shard=2")
    assert outcome.code == 2 and "torchrun --nproc-per-node 2" in outcome.err
    assert not (tmp_path / "run").exists()


def test_the_first_process_of_a_machine_speaks_first(sala, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr("sala.cli.time.sleep", waited.append)
    for rank in ("0", "", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        outcome = sala("train", "smok", "--out", tmp_path / "run")
        assert outcome.code == 2 and "did you mean 'smoke'" in outcome.err
    assert len(waited) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stages.short.step=3"], "unknown key 'step'; did you mean 'steps'?"),
        (["stages.short.learning_rate.peek=1"], "unknown key 'peek'; did you mean 'peak'?"),
        (["model.hiden_size=3"], "unknown key; did you mean 'hidden_size'?"),
        (["stages.short.data={txt: 1}"], "stages.0 ('short'): data task 'txt' is unknown; known: text, "),
        (["stages.short.length=8"], "stages.0 ('short'): length 8 is too short for the tasks; at least 32"),
        (["stages.short.steps=null", "stages.short.tokens=1000"], "expected 896 (steps 7) or 1,024 (steps 8)"),
        (["stages.short.learning_rate.peak=1e999"], "peak: Input should be a finite number"),
        (["seed=-1"], "seed: Input should be greater than or equal to 0"),
        (["model.vocab_size=10"], "the model a vocab_size of 10; expected the model's own"),
        (["stages.short.trainable=linear_attention"], "chooses nothing in a model with mixers attention"),
        (["stages.short.sparse=true"], "sparse_config is None"),
        (["init.lags=[1]", "model.attn_use_rope=true"], "init: qk_bias_std and lags need query and key biases"),
        (["init.lags=[1]", "model.qkv_bias=true"], "expected model.attn_use_rope: true"),
        (
            ["init.lags=[1, 2, 3]", "model.qkv_bias=true", "model.attn_use_rope=true"],
            "asks for 3 heads; expected at most the 2",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line_and_leaves_no_folder(
    settings, message, sala, recipe, tmp_path, little_text
):
    options = [word for setting in settings for word in ("--set", setting)]
    outcome = sala("train", recipe, "--out", tmp_path / "run", *options)
    assert outcome.code == 2 and message in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    # what a dry run says is what the run says
    assert sala("train", recipe, "--dry-run", *options) == outcome


LINEAR, NO_FRACTION = "stages.distill.trainable=linear_attention", "conversion.keep.fraction=null"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["conversion.keep.fraction=1", LINEAR], "chooses nothing in a model with mixers attention"),
        ([NO_FRACTION, "conversion.keep.count=4", LINEAR], "chooses nothing in a model with mixers attention"),
        (["conversion.keep={layers: [3, 0, 2, 1]}", LINEAR], "chooses nothing in a model with mixers attention"),
        (["conversion.keep={layers: [99]}"], "names layer 99; the teacher has 0 to 3"),
        (["conversion.keep={count: 1, first_last: true}"], "keep is 1; with 4 layers it must be 2"),
    ],
)
def test_a_conversion_that_cannot_be_leaves_no_folder(settings, message, sala, teacher, tmp_path):
    options = [word for setting in settings for word in ("--set", setting)]
    out = ("--out", tmp_path / "run")
    for verb in (("train", "smoke", *out), ("convert", "--recipe", "smoke", *out), ("train", "smoke", "--dry-run")):
        outcome = sala(*verb, "--teacher", teacher, *options)
        assert outcome.code == 2 and message in outcome.err
        assert len(outcome.err.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_a_hybrid_is_no_teacher(sala, hybrid, tmp_path):
    outcome = sala("train", "smoke", "--teacher", hybrid, "--out", tmp_path / "run")
    assert outcome.code == 2 and "a conversion starts from 'attention' in every layer" in outcome.err
    assert not (tmp_path / "run").exists()
    assert sala("train", "smoke", "--teacher", hybrid, "--dry-run") == outcome


def test_a_dry_run_refuses_weights_that_are_not_there(sala, teacher, tmp_path):
    torn = shutil.copytree(teacher, tmp_path / "torn")
    (torn / "model.safetensors").unlink()
    for rest in (("--out", tmp_path / "run"), ("--dry-run",)):
        outcome = sala("train", "smoke", "--teacher", torn, *rest)
        assert outcome.code == 2 and "lacks model.safetensors" in outcome.err


def test_a_conversion_is_one_run_by_either_verb(sala, teacher, tmp_path, little_text):
    uniform, run = ("--teacher", teacher, "--set", "conversion.keep.method=uniform"), tmp_path / "run"
    convert = ("convert", "--recipe", "smoke", "--out", run, *uniform)
    outcome = sala(*convert, "--save-every", 1)
    assert outcome.code == 0 and outcome.out == f"{run / 'final'}\n"
    assert list((run / "checkpoints").glob("step-*"))
    for again in (convert, ("train", "smoke", "--out", run, *uniform)):
        outcome = sala(*again)
        assert outcome.code == 0 and outcome.out == f"{run / 'final'}\n" and "is finished" in outcome.err
    shutil.rmtree(run / "final")
    assert sala(*convert, "--resume", "previous").code == 0
    assert (run / "final" / "model.safetensors").is_file()
    outcome = sala(*convert, "--set", "seed=1")
    assert outcome.code == 2 and "has seed = 0, this recipe 1" in outcome.err
    assert "no effect with --save-every" in sala(*convert, "--save-every", 3, "--save-minutes", 2).err


def test_weights_that_are_not_finite_are_named_and_no_rate_is_blamed(sala, teacher, tmp_path, little_text):
    broken = shutil.copytree(teacher, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["model.layers.2.mlp.down_proj.weight"][1, 1] = math.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    outcome = sala("convert", "--teacher", broken, "--recipe", "smoke", "--out", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.err == (
        f"sala: the teacher '{broken}': tensor 'model.layers.2.mlp.down_proj.weight' holds nan; expected finite weights\n"
    )
    assert not (tmp_path / "run").exists()


def test_shards_are_counted_and_those_of_another_tokenizer_refused(sala, recipe, tmp_path):
    (tmp_path / "docs").mkdir()
    for name, content in (("long.txt", TEXT.encode()), ("empty.txt", b""), ("latin.txt", b"caf\xe9")):
        (tmp_path / "docs" / name).write_bytes(content)
    outcome = sala("data", tmp_path / "docs", "--out", tmp_path / "web", "--tokenizer", "embedded-teacher")
    assert outcome.code == 0
    for line in ("1 documents, ", "skipped 1 empty: ", "skipped 1 not UTF-8: "):
        assert line in outcome.out
    train = ("train", recipe, "--out", tmp_path / "run", "--set", "stages.short.data={web: 1}", "--set")
    shards = f"sources={{web: {{shards: {tmp_path / 'web'}}}}}"
    train_tokenizer([Document("a.py", TEXT)], vocab_size=300).save_pretrained(tmp_path / "words")
    outcome = sala(*train, shards, "--tokenizer", tmp_path / "words")
    assert outcome.code == 2 and "was tokenised with another tokenizer" in outcome.err
    assert not (tmp_path / "run").exists()
    outcome = sala(*train, shards)
    assert outcome.code == 0
    assert "1 documents are longer than 64 and are cut" in outcome.err


def test_shards_of_ones_own_tokenizer_ask_for_it_by_the_option(sala, recipe, tmp_path, monkeypatch):
    train_tokenizer([Document("a.py", TEXT)], vocab_size=300).save_pretrained(tmp_path / "words")
    (tmp_path / "long.txt").write_text(TEXT)
    outcome = sala("data", tmp_path / "long.txt", "--out", tmp_path / "web", "--tokenizer", tmp_path / "words")
    assert outcome.code == 0
    shards = ("--set", "stages.short.data={web: 1}", "--set", f"sources={{web: {{shards: {tmp_path / 'web'}}}}}")
    mine, run, plan = ("--tokenizer", tmp_path / "words"), ("--out", tmp_path / "run"), ("--dry-run",)
    for what in (run, plan):
        outcome = sala("train", recipe, *what, *shards)
        assert outcome.code == 2 and outcome.err.endswith(
            "It is the tokenizer of embedded-teacher, for none was named; expected --tokenizer CHECKPOINT\n"
        )
    assert not (tmp_path / "run").exists()
    assert sala("train", recipe, *plan, *shards, *mine).code == 0
    assert sala("train", recipe, *run, *shards, *mine).code == 0
    # the words are found from another folder too
    monkeypatch.chdir(tmp_path)
    again = ("train", recipe, "--out", "relative", *shards, "--tokenizer", "words")
    assert sala(*again).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert sala("train", "export", "../relative", "--out", "model").code == 0
    # a teacher's tokenizer is the teacher's
    for what in (("--out", tmp_path / "hybrid"), plan):
        sources = ("--set", f"sources={{text: {{shards: {tmp_path / 'web'}}}}}")
        outcome = sala("train", "smoke", "--teacher", "embedded-teacher", *what, *sources)
        assert outcome.code == 2 and "another tokenizer" in outcome.err and "--tokenizer" not in outcome.err


def test_a_folder_that_is_no_run_of_ours_is_one_line(sala, recipe, tmp_path, little_text):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: [")
    for run, message in (
        (tmp_path / "file", "is a file; expected a new folder"),
        (tmp_path / "file" / "run", "Not a directory"),
        (tmp_path / "run", "recipe.yaml is not YAML"),
    ):
        outcome = sala("train", recipe, "--out", run)
        assert outcome.code == 2 and message in outcome.err
        assert len(outcome.err.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"
