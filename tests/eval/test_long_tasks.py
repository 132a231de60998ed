"""MRCR, NoLiMa and code: their structure, their scorers, and the official files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sala.errors import InputError
from sala.eval import TASKS, Prompt, Setting
from sala.eval.mrcr import score
from sala.eval.nolima import ASSOCIATIONS, DEPTHS, NAMES, contains


def make(name: str, setting: Setting, length: int = 4096, index: int = 0) -> Prompt:
    sample = TASKS[name].make(setting, length, index)
    assert isinstance(sample, Prompt)
    assert 0 <= length - setting.count(sample) - sample.max_new_tokens < 500
    return sample


@pytest.mark.parametrize("needles", [2, 4, 8])
def test_a_conversation_has_equal_requests_with_different_answers(tokenizer: Any, needles: int) -> None:
    prompt = make(f"mrcr_{needles}n", Setting(tokenizer))
    *turns, final = prompt.messages
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    marker, which, about = re.fullmatch(
        r"Prepend (\w{10}) to the (\d+)\w\w \(1 indexed\) (.+)\. Do not .*", final["content"]
    ).groups()  # type: ignore[union-attr]
    kinds = [turn["content"] for turn in turns[::2]]
    same = [i for i, kind in enumerate(kinds) if kind == f"Write a {about}."]
    answers = [turns[2 * i + 1]["content"] for i in same]
    assert len(set(answers)) == needles
    assert prompt.references == (marker + answers[int(which) - 1],)
    # the answer fits into what may be written
    assert len(tokenizer(prompt.references[0])["input_ids"]) <= prompt.max_new_tokens


@pytest.mark.parametrize(
    ("answer", "wanted"), [("abcXhello", 1.0), ("Xhello", 0.0), (" abcXhello", 0.0), ("abcX", 0.0), ("abcXhell", 8 / 9)]
)
def test_an_answer_without_the_marker_at_its_start_is_worth_nothing(answer: str, wanted: float) -> None:
    sample = Prompt((), ("abcXhello",), 1, facts={"marker": "abcX"})
    assert score(sample, answer, "nvidia") == pytest.approx(wanted)


def test_official_conversations_are_binned_by_tokens_and_needles(tokenizer: Any, tmp_path: Path) -> None:
    def row(needles: int, lines: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": "Write. " * lines}]
        return {"prompt": json.dumps(messages), "answer": "hi", "n_needles": needles, "random_string_to_prepend": "h"}

    rows = [row(2, 100), row(4, 100), row(2, 1000), row(2, 120)]
    (tmp_path / "mrcr.jsonl").write_text("\n".join(map(json.dumps, rows)))
    setting = Setting(tokenizer, files={"mrcr": tmp_path / "mrcr.jsonl"})
    sizes = [setting.count(Prompt(tuple(json.loads(r["prompt"])), (), 0)) for r in rows]
    length = sizes[3] + 40
    found = [TASKS["mrcr_2n"].make(setting, length, i) for i in range(2)]
    assert [len(prompt.messages[0]["content"]) for prompt in found if isinstance(prompt, Prompt)] == [700, 840]
    assert found[0].facts["label"] == "mrcr"
    with pytest.raises(InputError, match="2 rows of 2 needles"):
        TASKS["mrcr_2n"].make(setting, length, 2)


def test_a_needle_lies_at_its_depth_and_shares_no_telling_word_with_its_question(tokenizer: Any) -> None:
    setting = Setting(tokenizer)
    for index in (0, 13, 25):
        prompt = make("nolima", setting, 2048, index)
        text = str(prompt.messages[0]["content"])
        context = text.split("\n\n")[1]
        at = context.index(prompt.evidence[0]) / (len(context) - len(prompt.evidence[0]))
        assert abs(at - index / (DEPTHS - 1)) < 0.05
        assert prompt.references[0] in NAMES and text.count(prompt.references[0]) == 1


def test_associations_share_no_words_of_content() -> None:
    common = {
        "which",
        "character",
        "has",
        "a",
        "the",
        "to",
        "could",
        "would",
        "not",
        "with",
        "is",
        "in",
        "some",
        "been",
    }
    common |= {"lives"}
    for needle, question in ASSOCIATIONS:
        words = [set(re.findall(r"[a-z]+", text.replace("{name}", "").lower())) - common for text in (needle, question)]
        assert not words[0] & words[1]


def test_a_name_counts_in_its_own_letters() -> None:
    sample = Prompt((), ("Bodil",), 1)
    assert contains(sample, "It is Bodil.", "nvidia") == 1.0
    assert contains(sample, "bodil", "nvidia") == 0.0


def test_the_official_needles_are_filled_in(tokenizer: Any, tmp_path: Path) -> None:
    entry = {
        "id": "1",
        "needle": "{CHAR} lives next to {1}.",
        "questions": {"onehop": "Who has been to {2}?"},
        "tests": {"a": {"input_args": ["a tower", "a city"]}},
        "character_set": ["Zoe"],
    }
    (tmp_path / "needle_set.json").write_text(json.dumps([entry]))
    prompt = make("nolima", Setting(tokenizer, files={"nolima": tmp_path / "needle_set.json"}), 1024)
    assert prompt.evidence == ("Zoe lives next to a tower.",) and prompt.facts["label"] == "nolima"
    assert "Who has been to a city?" in prompt.messages[0]["content"]


@pytest.mark.parametrize(("name", "hops"), [("code_lookup", 1), ("code_hops", 3)])
def test_the_asked_function_leads_to_the_number_through_files(tokenizer: Any, name: str, hops: int) -> None:
    prompt = make(name, Setting(tokenizer), 8192)
    text = str(prompt.messages[0]["content"])
    function, path = re.search(r"`(\w+)\(\)` in (\S+) return", text).groups()  # type: ignore[union-attr]
    files = dict(re.findall(r"^# (app/\S+)\n((?:from .*\n|\n|def .*\n|    return .*\n)+)", text, re.MULTILINE))
    assert len(files) == 4 * hops
    for _ in range(hops - 1):
        module, called = re.search(r"from (\S+) import (\w+)", files[path]).groups()  # type: ignore[union-attr]
        assert f"def {function}():\n    return {called}()" in files[path]
        path, function = module.replace(".", "/") + ".py", called
    assert f"def {function}():\n    return {prompt.references[0]}\n" in files[path]
    assert text.count(prompt.references[0]) == 1
