"""`sala train` stops, goes on and exports; who speaks when many processes fail."""

import os
import signal

import pytest

from sala.data import Document
from sala.train.record import Record

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
    assert outcome.code == 2 and "is finished" in outcome.err


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
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        outcome = sala("train", "smok", "--out", tmp_path / "run")
        assert outcome.code == 2 and "did you mean 'smoke'" in outcome.err
    assert len(waited) == 1
