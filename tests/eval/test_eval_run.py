"""Runs: what is written, that they can be interrupted anywhere, and what an error costs."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sala.errors import InputError
from sala.eval import Answer, Plan, Prompt, Request, Setting, Task, run
from sala.eval.run import SAMPLES, read_samples
from sala.eval.task import TooShortError, ask


def count(setting: Setting, length: int, index: int) -> Prompt:
    if index == 7:
        raise TooShortError("the shortest prompt has 99 tokens")
    return Prompt(ask(f"Count to {index}."), (str(index),), 8, evidence=(f"{index}.",), facts={"depths": [0.5]})


def contains(sample: Prompt, answer: str, style: Any) -> float:
    return float(sample.references[0] in answer)


COUNT = Task("count", count, contains, "counting")
AGAIN = Task("again", count, contains, "counting")


class Counter:
    """Answers right but to 2; to 4 it has no answer, and after `most` answers it breaks."""

    name = "counter"

    def __init__(self, most: int = 1000):
        self.most, self.asked = most, 0

    def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]:
        for request in requests:
            if self.asked == self.most:
                raise KeyboardInterrupt
            self.asked += 1
            wanted = request.prompt.references[0]
            if wanted == "4":
                yield request.key, Answer(error="status 500")
            else:
                said = "three" if wanted == "2" else f"<think>2 3 4</think>{wanted}"
                yield request.key, Answer(said, "stop", read_tokens=len(request.tokens))

    def predict(self, windows: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def plan() -> Plan:
    return Plan((COUNT, AGAIN), (64, 128), 6)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_sample_is_a_line_with_everything_that_one_asks_later(tokenizer: Any, plan: Plan, tmp_path: Path) -> None:
    setting = Setting(tokenizer)
    run(plan, Counter(), setting, tmp_path)
    record = read_samples(tmp_path)[1]
    tokens = setting.tokens(count(setting, 64, 1))
    assert record == {
        "task": "count",
        "length": 64,
        "index": 1,
        "prompt": record["prompt"],
        "tokens": len(tokens),
        "new_tokens": 8,
        "bos": 1,
        "places": [len(tokens) - 2],
        "depths": [0.5],
        "answer": "<think>2 3 4</think>1",
        "finish": "stop",
        "read_tokens": len(tokens),
        "score": 1.0,
    }
    assert len(record["prompt"]) == 16


def test_an_error_is_told_and_left_out_of_the_mean(tokenizer: Any, plan: Plan, tmp_path: Path) -> None:
    rows = run(plan, Counter(), Setting(tokenizer), tmp_path)
    assert {(row.task, row.score, row.errors) for row in rows} == {
        ("count", 0.8, 1),
        ("again", 0.8, 1),
        ("counting average of 2", 0.8, 2),
    }
    [failed] = [record for record in read_samples(tmp_path) if record["index"] == 4 and record["length"] == 64][:1]
    assert failed["error"] == "status 500" and "score" not in failed
    assert "1 of 6 failed" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("most", [0, 1, 5, 11, 23])
def test_an_interrupted_run_ends_with_the_same_files(tokenizer: Any, plan: Plan, tmp_path: Path, most: int) -> None:
    run(plan, Counter(), Setting(tokenizer), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(plan, Counter(most), Setting(tokenizer), tmp_path / "broken")
    with (tmp_path / "broken" / SAMPLES).open("a") as file:
        # a line that was being written when the power went
        file.write('{"task": "count", "len')
    again = Counter()
    run(plan, again, Setting(tokenizer), tmp_path / "broken")
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    # only what is missing, and what had failed
    assert again.asked <= 24 - most + 4


def test_a_finished_run_asks_again_only_what_failed(tokenizer: Any, plan: Plan, tmp_path: Path) -> None:
    run(plan, Counter(), Setting(tokenizer), tmp_path)
    again = Counter()
    run(plan, again, Setting(tokenizer), tmp_path)
    assert again.asked == 4


def test_another_settings_samples_are_not_mixed_in(tokenizer: Any, plan: Plan, tmp_path: Path) -> None:
    run(plan, Counter(), Setting(tokenizer), tmp_path)
    with pytest.raises(InputError, match="seed = 42, not 1"):
        run(plan, Counter(), Setting(tokenizer, seed=1), tmp_path)


def test_a_damaged_line_in_the_middle_is_refused(tokenizer: Any, plan: Plan, tmp_path: Path) -> None:
    run(plan, Counter(), Setting(tokenizer), tmp_path)
    lines = (tmp_path / SAMPLES).read_text().splitlines()
    (tmp_path / SAMPLES).write_text("\n".join([lines[0], "{", *lines[2:]]))
    with pytest.raises(InputError, match="line 2"):
        run(plan, Counter(), Setting(tokenizer), tmp_path)


def test_a_length_that_is_too_short_for_one_sample_is_that_samples_error(tokenizer: Any, tmp_path: Path) -> None:
    [row] = run(Plan((COUNT,), (64,), 8), Counter(), Setting(tokenizer), tmp_path)
    assert (row.samples, row.errors) == (8, 2)
    assert "99 tokens" in json.loads((tmp_path / SAMPLES).read_text().splitlines()[7])["error"]


def test_a_prompt_above_its_length_is_an_error_and_no_score(tokenizer: Any, tmp_path: Path) -> None:
    [row] = run(Plan((COUNT,), (8,), 1), Counter(), Setting(tokenizer), tmp_path)
    assert row.score is None and row.errors == 1
    assert "expected at most 8" in read_samples(tmp_path)[0]["error"]


@pytest.mark.parametrize(
    ("answer", "score"), [("<think>5</think>no", 0.0), ("<think>5", 0.0), ("5", 1.0), ("a</think>5", 1.0)]
)
def test_thoughts_are_no_answer(tokenizer: Any, tmp_path: Path, answer: str, score: float) -> None:
    class Thinker(Counter):
        def generate(self, requests: Iterable[Request]) -> Iterator[tuple[Any, Answer]]:
            for request in requests:
                yield request.key, Answer(answer)

    five = Task("five", lambda setting, length, index: count(setting, length, 5), contains, "counting")
    [row] = run(Plan((five,), (64,), 1), Thinker(), Setting(tokenizer), tmp_path)
    assert row.score == score
