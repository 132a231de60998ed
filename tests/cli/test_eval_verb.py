"""`sala eval` from the command line."""

import json

import pytest

from eval.server import completion, serving


def test_a_model_is_asked_and_the_table_is_printed(sala, hybrid, tmp_path):
    command = ("eval", "run", "--model", hybrid, "--out", tmp_path / "a", "--lengths", "256,512", "--samples", 1)
    first = sala(*command, "--tasks", "retrieval,niah_single_1,ppl")
    assert first.code == 0, first.err
    assert first.out.startswith("| task | measure | 256 | 512 |")
    assert first.out == (tmp_path / "a" / "summary.md").read_text()
    records = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 5
    again = sala(*command, "--tasks", "retrieval,niah_single_1,ppl")
    assert again.out == first.out
    compared = sala("eval", "compare", tmp_path / "a", tmp_path / "a")
    assert compared.code == 0 and "| ppl | 256 | 1 |" in compared.out


def test_tasks_are_listed_with_what_they_need(sala):
    listed = sala("eval", "tasks").out
    assert "niah_multikey_2" in listed and "needs --file squad=PATH" in listed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tasks", "rulr"), "did you mean 'ruler'?"),
        (("--tasks", "qa_1"), "expected --file squad=PATH"),
        (("--file", "prosa=x"), "expected NAME=PATH"),
        (("--file", "prose=nowhere.txt"), "no file 'nowhere.txt'"),
        (("--style", "mine"), "expected one of nvidia"),
        (("--lengths", "4Q"), "expected a number of tokens"),
        (("--endpoint", "http://localhost:1/v1"), "expected --model NAME --tokenizer FOLDER"),
    ],
)
def test_what_cannot_be_asked_is_one_line(sala, hybrid, tmp_path, arguments, said):
    outcome = sala("eval", "run", "--out", tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert said in outcome.err and len(outcome.err.strip().splitlines()) == 1


def test_programs_are_run_only_when_that_is_allowed(sala, tmp_path):
    row = {"task_id": 1, "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    pass\n"}
    (tmp_path / "humaneval.jsonl").write_text(json.dumps(row))
    command = ("eval", "run", "--out", tmp_path / "out", "--tasks", "humaneval", "--samples", 1, "--lengths", "256")
    file = ("--file", f"humaneval={tmp_path / 'humaneval.jsonl'}")
    refused = sala(*command, *file)
    assert refused.code == 2 and "expected --allow-code-execution" in refused.err
    allowed = sala(*command, *file, "--allow-code-execution")
    assert allowed.code == 0 and "| humaneval | share right |" in allowed.out


def test_a_server_is_asked_as_a_model_is(sala, hybrid, tmp_path):
    def reply(path, body, headers):
        return completion("1234567", len(body["prompt"]))

    with serving(reply) as url:
        outcome = sala(
            *("eval", "run", "--out", tmp_path, "--endpoint", url, "--model", "theirs", "--tokenizer", hybrid),
            *("--tasks", "niah_single_1", "--lengths", "512", "--samples", 3),
        )
    assert outcome.code == 0, outcome.err
    assert "| niah_single_1 | share right | 0.00 [0.00, 0.00] |" in outcome.out


def test_folders_that_are_no_runs_are_refused(sala, tmp_path):
    outcome = sala("eval", "compare", tmp_path, tmp_path)
    assert outcome.code == 2 and "expected the --out of `sala eval run`" in outcome.err


def test_the_blocks_that_a_query_chose_are_drawn(sala, tmp_path):
    outcome = sala("eval", "blocks", "--length", "4K", "--out", tmp_path / "blocks.png")
    assert outcome.code == 0, outcome.err
    assert "of 2 groups of heads chose the answer's blocks" in outcome.out
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")
    short = sala("eval", "blocks", "--length", "512", "--out", tmp_path / "none.png")
    assert short.code == 2 and "expected block-sparse layers" in short.err
    assert "has no one place" in sala("eval", "blocks", "--task", "fwe", "--out", tmp_path / "none.png").err
