"""A document is read once, is there for every question and after a restart, and its name is no path."""

import json
from urllib.parse import quote

import pytest

from sala.engine import join
from sala.serve.server import EngineLimits
from serve.conftest import LONG, QUESTION
from serve.test_api import CHAT, TEXT, error


def read(live, name):
    lines = live.http.post(f"/documents/{name}/read").text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def test_a_document_is_put_read_asked_and_deleted(serving, alone):
    with serving(template=None, limits=EngineLimits(chunk=256)) as live:
        assert live.http.put("/documents/book.txt", content=LONG).json()["characters"] == len(LONG)
        *progress, last = read(live, "book.txt")
        assert [step["read"] for step in progress if step] == sorted(step["read"] for step in progress if step)
        assert progress[-1]["read"] == progress[-1]["total"] == last["document"]["tokens"]
        body = {"prompt": QUESTION, "documents": ["book.txt"], "max_tokens": 2, "debug": True}
        reply = live.http.post(TEXT, json=body).json()
        assert reply["choices"][0]["text"] == alone(join(LONG, QUESTION), 2).text
        assert reply["prefix"][0]["cached_tokens"] > last["document"]["tokens"] - 130
        assert live.http.get("/documents/book.txt").text == LONG
        assert live.http.delete("/documents/book.txt").json() == {"deleted": "book.txt"}
        error(live.http.post(TEXT, json=body), 404)


def test_a_chat_about_a_document_finds_what_was_read(live):
    live.http.put("/documents/chatted", content=LONG)
    (*_, last) = read(live, "chatted")
    body = {"messages": [{"role": "user", "content": "who?"}], "documents": ["chatted"], "max_tokens": 2}
    usage = live.http.post(CHAT, json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > last["document"]["tokens"] - 130


def test_evidence_is_where_the_answer_stands(serving):
    with serving(template=None) as live:
        live.http.put("/documents/book", content=LONG * 3)
        body = {"prompt": QUESTION, "documents": ["book"], "max_tokens": 2, "evidence": True}
        (passages,) = live.http.post(TEXT, json=body).json()["evidence"]
        assert any("@amber @birch" in passage["text"] for passage in passages)
        for passage in passages:
            assert passage["document"] == "book"
            assert passage["text"] == (LONG * 3)[passage["start"] : passage["end"]]
        assert [passage["share"] for passage in passages] == sorted((p["share"] for p in passages), reverse=True)


def test_a_read_document_is_there_after_a_restart(serving, tmp_path, alone):
    with serving(template=None, documents=tmp_path) as live:
        live.http.put("/documents/book.txt", content=LONG)
        assert read(live, "book.txt")[-1]["document"]["saved"]
    (tmp_path / "other.sala").write_bytes(b"no document")
    with serving(template=None, documents=tmp_path) as live:
        (listed,) = live.http.get("/documents").json()["documents"]
        assert listed["read"] and listed["saved"]
        body = {"prompt": QUESTION, "documents": ["book.txt"], "max_tokens": 4}
        reply = live.http.post(TEXT, json=body).json()
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > listed["tokens"] - 130
        assert reply["choices"][0]["text"] == alone(join(LONG, QUESTION), 4).text
        live.http.delete("/documents/book.txt")
        assert [path.name for path in tmp_path.iterdir()] == ["other.sala"]


@pytest.mark.parametrize(
    "name", ["..", ".hidden", "a/b", "../../etc/passwd", "a\\b", "a\0b", "x" * 121, "é" * 110, "\n"]
)
def test_a_name_that_is_a_path_is_refused(serving, tmp_path, name):
    folder = tmp_path / "documents"
    with serving(documents=folder) as live:
        response = live.http.put(f"/documents/{quote(name, safe='')}", content="text")
        error(response, response.status_code)
        assert response.status_code in (400, 404, 405)
        assert not list(folder.iterdir()) and [path.name for path in tmp_path.iterdir()] == ["documents"]


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe", b"a\0b"])
def test_what_is_no_text_is_refused(live, content):
    assert "expected text in UTF-8" in error(live.http.put("/documents/bad", content=content))["message"]


def test_a_document_that_is_too_long_says_so(serving):
    with serving(template=None, max_length=500) as live:
        live.http.put("/documents/book", content=LONG)
        (problem,) = read(live, "book")
        assert "expected fewer than 500" in problem["error"]["message"]
