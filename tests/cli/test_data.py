"""`sala data` as a person runs it."""

import json
import os
from pathlib import Path

import pytest

from sala.data import Shards


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_become_shards_and_a_summary(sala, tmp_path):
    lines = write(tmp_path / "a.jsonl", [{"body": "one"}, {"text": "two"}, {"body": ""}])
    (tmp_path / "b.txt").write_text("a whole file")
    outcome = sala(
        "data",
        lines,
        tmp_path / "b.txt",
        "--tokenizer",
        "embedded-teacher",
        "--out",
        tmp_path / "out",
        "--text-field",
        "body",
    )
    assert outcome.code == 0
    summary, out = outcome.out.splitlines()[0], outcome.out.splitlines()[-1]
    assert summary.startswith("2 documents, ")
    assert f"skipped 1 empty: {lines}:3" in outcome.out
    assert f"skipped 1 without text in 'body': {lines}:2" in outcome.out
    assert Path(out) == tmp_path / "out"
    assert Shards(out).num_documents == 2


def test_pipes_and_links_and_special_tokens(sala, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a<|end|>b")
    (tmp_path / "in" / "b.txt").symlink_to("/etc/passwd")
    reader, end = os.pipe()
    os.write(end, b'{"text": "one"}\n{"text": "two"}\n')
    os.close(end)
    options = ("--tokenizer", "embedded-teacher")
    piped = sala("data", f"/dev/fd/{reader}", "--format", "jsonl", *options, "--out", tmp_path / "piped")
    os.close(reader)
    assert piped.out.startswith("2 documents, ")
    outcome = sala("data", tmp_path / "in", *options, "--out", tmp_path / "out")
    assert "passed over 1 links that lead out of their folder" in outcome.err
    assert "1 special token spelled out in the text was read as text" in outcome.out
    asked = sala("data", tmp_path / "in", *options, "--special-tokens", "--out", tmp_path / "asked")
    assert "spelled out" not in asked.out
    sizes = [Shards(tmp_path / name).num_tokens for name in ("out", "asked")]
    assert sizes[1] == 5 < sizes[0]


def test_a_local_data_set_is_streamed(sala, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "test.jsonl", [{"text": "one"}, {"text": "two"}])
    options = ("--tokenizer", "embedded-teacher", "--out", tmp_path / "out")
    outcome = sala("data", "--dataset", tmp_path / "set", "--split", "test", *options)
    assert outcome.code == 0
    assert Shards(tmp_path / "out").header["source"] == [str(tmp_path / "set"), "test"]
    assert Shards(tmp_path / "out").num_documents == 2


def test_conversations_need_a_chat_template(sala, tmp_path):
    lines = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    outcome = sala("data", lines, "--tokenizer", "embedded-teacher", "--out", tmp_path / "out", "--chat")
    assert (outcome.code, outcome.out) == (2, "")
    assert "has no chat template" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_missing_or_given_twice_is_refused(sala, tmp_path):
    options = ("--tokenizer", "embedded-teacher", "--out", tmp_path / "out")
    assert "give either files or --dataset" in sala("data", *options).err
    assert "give either files or --dataset" in sala("data", "a.txt", "--dataset", "b", *options).err
    assert "--format belongs to files" in sala("data", "--dataset", "b", "--format", "text", *options).err
    assert "belong to --dataset" in sala("data", "a.txt", "--split", "test", *options).err
    assert "no file or folder 'a.txt'" in sala("data", "a.txt", *options).err


def test_an_output_that_exists_is_refused(sala, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    outcome = sala("data", tmp_path / "a.txt", "--tokenizer", "embedded-teacher", "--out", tmp_path)
    assert outcome.code == 2
    assert "exists already" in outcome.err
