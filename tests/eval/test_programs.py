"""Programs that a model wrote: what passes, and what the limits stop."""

import base64
import json
import pickle
import re
import zlib
from pathlib import Path
from typing import Any

import pytest

from sala.errors import InputError
from sala.eval import TASKS, Prompt, Setting
from sala.eval.programs import livecodebench_tests, source_of
from sala.eval.sandbox import run_program

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Return a + b."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
MBPP = {"task_id": 1, "prompt": "Write add.", "test_imports": ["import math"], "test_list": ["assert add(1, 2) == 3"]}
LIVE: dict[str, Any] = {
    "question_id": "q",
    "question_content": "Add the numbers.",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": json.dumps([{"input": "4 5\n", "output": "9", "testtype": "stdin"}]),
}


def scored(name: str, row: dict[str, Any], answer: str, tokenizer: Any, tmp_path: Path) -> float:
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    setting, task = Setting(tokenizer, files={name: tmp_path / "data.jsonl"}), TASKS[name]
    sample = task.make(setting, 1024, 0)
    assert isinstance(sample, Prompt) and task.runs_code
    assert setting.count(sample) + sample.max_new_tokens == 1024
    return task.score(sample, answer, "nvidia")


@pytest.mark.parametrize(
    ("name", "row", "answer", "score"),
    [
        ("humaneval", HUMANEVAL, "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.", 1.0),
        ("humaneval", HUMANEVAL, "    return a + b\n", 1.0),
        ("humaneval", HUMANEVAL, "```python\ndef add(a, b):\n    return a - b\n```", 0.0),
        ("humaneval", HUMANEVAL, "I do not know.", 0.0),
        ("mbpp", MBPP, "```python\ndef add(a, b):\n    return math.floor(a + b)\n```", 1.0),
        ("mbpp", MBPP, "```python\ndef add(a, b):\n    return 4\n```", 0.0),
        ("livecodebench", LIVE, "```python\nprint(sum(map(int, input().split())))\n```", 1.0),
        ("livecodebench", LIVE, "```python\nprint(3)\n```", 0.0),
    ],
)
def test_an_answer_is_right_when_its_tests_pass(
    tokenizer: Any, tmp_path: Path, name: str, row: dict[str, Any], answer: str, score: float
) -> None:
    assert scored(name, row, answer, tokenizer, tmp_path) == score


def test_a_function_is_called_where_the_problem_says_so(tokenizer: Any, tmp_path: Path) -> None:
    case = {"input": "[1, 2]\ntrue", "output": "3", "testtype": "functional"}
    row = LIVE | {
        "public_test_cases": json.dumps([case]),
        "private_test_cases": "[]",
        "metadata": json.dumps({"func_name": "total"}),
        "starter_code": "class Solution:\n    def total(self, x, y):",
    }
    answer = "```python\nclass Solution:\n    def total(self, x, y: bool) -> int:\n        return sum(x)\n```"
    assert scored("livecodebench", row, answer, tokenizer, tmp_path) == 1.0


def test_packed_tests_are_read_and_nothing_is_imported_for_them() -> None:
    def packed(value: Any) -> dict[str, Any]:
        return LIVE | {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(value))).decode()}

    assert len(livecodebench_tests(packed(LIVE["private_test_cases"]))) == 2
    with pytest.raises(InputError, match="expected text alone"):
        livecodebench_tests(packed(print))


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("while True: pass", "more than 1 s|exit -"),
        ("import os\nwhile True: os.fork()", "more than 1 s|Resource temporarily"),
        ("x = bytearray(4 * 2**30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(2**22))", "File too large"),
        ("import socket; socket.create_connection(('127.0.0.1', 80), timeout=2)", "unreachable|refused|Network"),
        ("raise ValueError('no')", "ValueError: no"),
        ("import sys; sys.exit(3)", "exit 3"),
    ],
)
def test_a_program_beyond_its_limits_fails_and_says_why(program: str, error: str) -> None:
    outcome = run_program(program, timeout_s=1.0)
    assert not outcome.passed
    assert re.search(error, outcome.error), outcome.error


REMOUNT = "import ctypes; ctypes.CDLL(None).mount(b'none', b'/', None, 32 | 4096, None)\n"


@pytest.mark.parametrize("before", ["", REMOUNT])
@pytest.mark.parametrize("act", ["open({!r}, 'w')", "import os; os.remove({!r})"])
def test_a_program_changes_no_file_but_its_own(tmp_path: Path, before: str, act: str) -> None:
    file = tmp_path / "precious"
    file.write_text("whole")
    outcome = run_program(before + act.format(str(file)))
    assert not outcome.passed and "Read-only file system" in outcome.error
    assert file.read_text() == "whole"


def test_a_program_reads_its_input_and_leaves_nothing_behind(tmp_path: Path) -> None:
    outcome = run_program("import os; open('left', 'w'); print(input(), os.getcwd())", "hello")
    said, folder = outcome.output.split()
    assert outcome.passed and said == "hello" and not Path(folder).exists()


def test_a_program_does_not_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert "secret" not in run_program("import os; print(os.environ)").output


def test_the_last_block_is_the_program() -> None:
    assert source_of("```python\na\n```\nbetter:\n```\nb\n```") == "b\n"
    assert source_of("```py\na = 1") == "a = 1"
