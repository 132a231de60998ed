"""A tiny hybrid and a tiny teacher with the embedded tokenizer, and the command line as a function."""

import math
from dataclasses import dataclass

import pytest

from model.shapes import tiny_model
from sala.cli import main, progress
from sala.data import load_tokenizer
from sala.model.checkpoint import find_checkpoint


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def no_line_for_its_time(monkeypatch):
    """A slow machine says no more than a fast one."""
    monkeypatch.setattr(progress, "PLAIN_LINE_EVERY_S", math.inf)


@pytest.fixture
def sala(capsys):
    """Run a command line in this process, which has torch loaded already."""

    def run(*arguments) -> Outcome:
        capsys.readouterr()  # what the test itself wrote before
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(leaving.value.code, captured.out, captured.err)

    return run


def save(path, **changes):
    tokenizer = load_tokenizer(find_checkpoint("embedded-teacher"))
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tiny_model(vocab_size=len(tokenizer), **ids, **changes).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "hybrid")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    plain = {"scale_emb": 1, "scale_depth": 2.0, "dim_model_base": 32}
    rows = {"mixer_types": ["attention"] * 4, "attn_use_rope": True, "attn_use_output_gate": False}
    return save(tmp_path_factory.mktemp("models") / "teacher", **rows, **plain)
