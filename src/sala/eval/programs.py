"""Writing programs: HumanEval, MBPP and LiveCodeBench from their files. An answer is right when its tests pass."""

import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sala.errors import InputError
from sala.eval.sandbox import run_program
from sala.eval.task import Prompt, Setting, Style, Task, TooShortError, ask

GROUP = "programs"
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def source_of(answer: str, start: str = "") -> str:
    """Return the program of an answer: its last block of code, else the answer itself behind `start`."""
    blocks = _BLOCK.findall(answer)
    return str(blocks[-1]) if blocks else start + answer


def _make(name: str, question: Callable[[Mapping[str, Any]], str], setting: Setting, length: int, index: int) -> Prompt:
    """Return a problem; the answer has all the room that the prompt leaves of `length`."""
    rows = setting.keep(name, lambda: _rows(setting.file(name), name))
    if index >= len(rows):
        raise InputError(f"{name} has {len(rows)} problems; expected no more --samples than that")
    row = rows[index]
    # the reference of a program is its tests
    facts = {"problem": str(row.get("task_id", row.get("question_id", index)))}
    prompt = Prompt(ask(question(row)), (json.dumps(row),), 0, facts=facts)
    room = length - setting.count(prompt)
    if room < 1:
        raise TooShortError(f"the problem has {length - room} tokens; expected a greater length than {length}")
    return replace(prompt, max_new_tokens=room)


def row_of(sample: Prompt) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(sample.references[0])
    return row


def ask_humaneval(row: Mapping[str, Any]) -> str:
    return f"Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{row['prompt']}```\n"


def score_humaneval(sample: Prompt, answer: str, style: Style) -> float:
    row = row_of(sample)
    program = source_of(answer, row["prompt"])
    # a body alone continues the prompt
    if f"def {row['entry_point']}" not in program:
        program = row["prompt"] + program
    return _passed(f"{program}\n\n{row['test']}\n\ncheck({row['entry_point']})\n")


def ask_mbpp(row: Mapping[str, Any]) -> str:
    tests = "\n".join(row["test_list"])
    return f"{row.get('prompt') or row['text']}\nYour code should pass these tests:\n\n{tests}\n\nAnswer with one block of Python code.\n"


def score_mbpp(sample: Prompt, answer: str, style: Style) -> float:
    row = row_of(sample)
    before = row.get("test_imports") or [row.get("test_setup_code", "")]
    return _passed("\n".join([source_of(answer), *before, *row["test_list"]]))


def ask_livecodebench(row: Mapping[str, Any]) -> str:
    start = f"\nUse this start:\n```python\n{row['starter_code']}\n```\n" if row.get("starter_code") else ""
    how = "" if start else "\nRead the input from standard input and print the answer."
    return f"{row['question_content']}\n{how}{start}\nAnswer with one block of Python code.\n"


def score_livecodebench(sample: Prompt, answer: str, style: Style) -> float:
    row, program = row_of(sample), source_of(answer)
    called = json.loads(row.get("metadata") or "{}").get("func_name")
    return float(all(_passes(program, case, called) for case in livecodebench_tests(row)))


def livecodebench_tests(row: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """Return the public and the private tests of a problem; the latter are packed."""
    private = row.get("private_test_cases") or "[]"
    if not private.lstrip().startswith("["):
        private = _Strings(io.BytesIO(zlib.decompress(base64.b64decode(private)))).load()
    return [*json.loads(row["public_test_cases"]), *json.loads(private)]


class _Strings(pickle.Unpickler):
    """Reads pickled text and nothing that would have to be imported."""

    def find_class(self, module: str, name: str) -> Any:
        raise InputError(f"a LiveCodeBench file asks for {module}.{name}; expected text alone")


def _passes(program: str, case: Mapping[str, str], called: str | None) -> bool:
    if case.get("testtype") == "functional":
        arguments = ", ".join(line for line in case["input"].splitlines() if line.strip())
        function = f"Solution().{called}" if "class Solution" in program else called
        test = f"assert {function}({arguments}) == {case['output']}"
        names = "null, true, false = None, True, False\n"
        return run_program(f"from typing import *\n{names}{program}\n\n{test}\n").passed
    outcome = run_program(program, case["input"])
    return outcome.passed and outcome.output.split() == case["output"].split()


def _passed(program: str) -> float:
    return float(run_program(program).passed)


def _rows(path: Path, name: str) -> list[Any]:
    try:
        text = path.read_text("utf-8")
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line]
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is no {name} file ({error}); expected JSON lines") from error
    return rows


TASKS = tuple(
    Task(name, partial(_make, name, question), score, GROUP, needs=name, runs_code=True)
    for name, question, score in (
        ("humaneval", ask_humaneval, score_humaneval),
        ("mbpp", ask_mbpp, score_mbpp),
        ("livecodebench", ask_livecodebench, score_livecodebench),
    )
)
