"""RULER's definitions, item by item, at lengths around where prompts and attention change."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sala.errors import InputError
from sala.eval import TASKS, Prompt, Setting
from sala.eval.ruler.niah import NOISE
from sala.eval.ruler.scoring import match_all, match_any

LENGTHS = (512, 4095, 4096, 8191, 8192, 8193)
NEEDLE = re.compile(r"One of the special magic (\w+) for ([\w '-]+) is: ([\w-]+)\.")
GENERATED = [name for name, task in TASKS.items() if task.group == "ruler" and task.needs is None]
# tokens that one more unit of a task takes at most: a needle of two uuids is the longest
LONGEST_UNIT = 100


@pytest.fixture(scope="module")
def setting(tokenizer: Any) -> Setting:
    return Setting(tokenizer)


def make(name: str, setting: Setting, length: int = 4096, index: int = 0) -> Prompt:
    sample = TASKS[name].make(setting, length, index)
    assert isinstance(sample, Prompt)
    return sample


def content(prompt: Prompt) -> str:
    return str(prompt.messages[0]["content"])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", GENERATED)
def test_a_prompt_and_its_answer_fill_the_length_to_a_unit_and_never_exceed_it(
    setting: Setting, name: str, length: int
) -> None:
    prompt = make(name, setting, length)
    tokens, _ = setting.written(prompt)
    spare = length - len(tokens) - prompt.max_new_tokens
    assert 0 <= spare < LONGEST_UNIT
    assert tokens.count(setting.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("style", ["nvidia", "lm-eval", "opencompass"])
@pytest.mark.parametrize("name", GENERATED)
def test_a_sample_depends_on_seed_length_and_index_alone(tokenizer: Any, name: str, style: Any) -> None:
    first = make(name, Setting(tokenizer, style=style), 2048, 3)
    assert make(name, Setting(tokenizer, style=style), 2048, 3) == first
    assert make(name, Setting(tokenizer, style=style), 2048, 4) != first
    assert make(name, Setting(tokenizer, style=style, seed=1), 2048, 3) != first


@pytest.mark.parametrize(
    ("name", "needles", "answers"),
    [
        ("niah_single_1", 1, 1),
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_the_haystack_has_the_defined_number_of_needles_and_answers(
    setting: Setting, name: str, needles: int, answers: int
) -> None:
    prompt = make(name, setting)
    found = NEEDLE.findall(content(prompt))
    assert len(found) == needles
    assert len(prompt.references) == len(prompt.evidence) == answers
    assert set(prompt.references) <= {value for _, _, value in found}


@pytest.mark.parametrize("name", [name for name in GENERATED if name.startswith("niah")])
def test_every_value_is_in_the_text_once_and_no_key_is_there_twice_but_that_of_several_values(
    setting: Setting, name: str
) -> None:
    text = content(make(name, setting))
    found = NEEDLE.findall(text)
    values = [value for _, _, value in found]
    assert len(set(values)) == len(values)
    keys = Counter(key for _, key, _ in found)
    assert set(keys.values()) == ({4} if name == "niah_multivalue" else {1})


@pytest.mark.parametrize(("name", "pattern"), [("niah_multikey_2", r"\d{7}"), ("niah_multikey_3", r"[0-9a-f-]{36}")])
def test_a_haystack_of_needles_has_nothing_else(setting: Setting, name: str, pattern: str) -> None:
    lines = content(make(name, setting)).splitlines()[1:-1]
    assert len(lines) > 20
    assert all(
        re.fullmatch(pattern, found[3]) for line in lines if (found := NEEDLE.fullmatch(line)) or pytest.fail(line)
    )


def test_noise_is_the_papers_and_numbers_have_seven_digits(setting: Setting) -> None:
    prompt = make("niah_single_1", setting)
    lines = content(prompt).splitlines()[1:-1]
    assert [line for line in lines if line != NOISE] == list(prompt.evidence)
    assert re.fullmatch(r"\d{7}", prompt.references[0])


def test_one_value_is_asked_for_in_the_singular_and_four_in_the_plural(setting: Setting) -> None:
    one, four = make("niah_single_2", setting), make("niah_multivalue", setting)
    assert content(one).startswith("A special magic number is hidden")
    assert content(one).rsplit("\n", 1)[1].startswith("What is the special magic number for ")
    assert one.prefix.endswith(" mentioned in the provided text is")
    assert content(four).startswith("Some special magic numbers are hidden")
    assert four.prefix.endswith(" mentioned in the provided text are")


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_1", "niah_multikey_2"])
def test_needles_are_spread_over_all_depths(setting: Setting, name: str) -> None:
    depths = [make(name, setting, 1024, index).facts["depths"][0] for index in range(40)]
    assert min(depths) < 0.15 and max(depths) > 0.85
    assert len(set(depths)) > 10


def test_places_are_the_tokens_at_which_needles_begin(setting: Setting) -> None:
    prompt = make("niah_multikey_1", setting)
    tokens, [place] = setting.written(prompt)
    text = setting.tokenizer.decode(tokens[place : place + 200])
    assert text.lstrip().startswith(prompt.evidence[0])


def test_a_chain_has_five_names_in_order_and_one_value(setting: Setting) -> None:
    prompt = make("vt", setting)
    question = content(prompt).split("\n\n", 2)[-1]
    assigned = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", question)
    names = [name for name, _ in assigned]
    assert names == list(prompt.references) and len(set(names)) == 5
    assert [source for _, source in assigned[1:]] == names[:-1]
    assert re.fullmatch(r"\d{5}", assigned[0][1]) and f"the value {assigned[0][1]}" in question


def test_tracking_shows_one_solved_example_with_names_of_three_letters(setting: Setting) -> None:
    example = content(make("vt", setting)).split("Memorize")[1]
    assert {len(name) for name in re.findall(r"VAR (\w+) =", example)} == {3}
    assert "they are:" in example


@pytest.mark.parametrize(("length", "often", "seldom"), [(2048, 6, 1), (8192, 30, 3)])
def test_common_words_come_up_as_often_as_defined(setting: Setting, length: int, often: int, seldom: int) -> None:
    prompt = make("cwe", setting, length)
    entries = re.findall(r"(\d+)\. ([^\d]+?)(?= \d+\.|\nQuestion)", content(prompt).split("Below is")[2])
    counts = Counter(word for _, word in entries)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    assert {word for word, count in counts.items() if count == often} == set(prompt.references)
    assert set(counts.values()) == {often, seldom}
    assert prompt.facts["label"] == "ruler"


def test_words_do_not_run_out_but_made_up_ones_are_told(setting: Setting) -> None:
    prompt = make("cwe", setting, 300_000)
    assert setting.count(prompt) > 299_000
    assert prompt.facts["label"] == "ruler-like"


def test_the_most_frequent_coded_words_are_the_answers(setting: Setting) -> None:
    prompt = make("fwe", setting, 8192)
    text = content(prompt).split("coded words. ", 1)[1].split("\nQuestion")[0]
    counts = Counter(text.split())
    (dots, _), *ranked = counts.most_common(5)
    assert dots == "..."
    assert [word for word, _ in ranked[:3]] == list(prompt.references)
    assert ranked[2][1] > ranked[3][1]
    assert all(re.fullmatch(r"[a-z]{6}", word) for word in counts if word != "...")


@pytest.fixture
def squad(tmp_path: Path) -> Path:
    def paragraph(n: int) -> dict[str, Any]:
        answers = [{"text": f"answer {n}"}, {"text": f"the {n}"}]
        asked = {"question": f"What is {n}?", "answers": answers, "is_impossible": False}
        impossible = {"question": "?", "answers": [], "is_impossible": True}
        return {"context": f"Paragraph {n} says answer {n}. " + "It goes on. " * n, "qas": [asked, impossible]}

    articles = [{"paragraphs": [paragraph(10 * i + k) for k in range(3)]} for i in range(8)]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": articles}))
    return path


def test_questions_have_their_gold_document_once_and_only_answerable_ones_are_asked(
    tokenizer: Any, squad: Path
) -> None:
    setting = Setting(tokenizer, files={"squad": squad})
    for index in range(3):
        prompt = make("qa_1", setting, 2048, index)
        documents = re.findall(r"Document \d+:\n(.*)", content(prompt))
        assert len(set(documents)) == len(documents) > 1
        assert sum(prompt.references[0] + "." in document for document in documents) == 1
        assert setting.count(prompt) + prompt.max_new_tokens <= 2048
    with pytest.raises(InputError, match="24 questions"):
        make("qa_1", setting, 2048, 24)


def test_hotpot_questions_keep_all_their_documents(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"question": f"q{i}", "answer": f"a{i}", "context": [[f"title {i} {k}", ["One. ", "Two."]] for k in range(3)]}
        for i in range(30)
    ]
    (tmp_path / "hotpot.json").write_text(json.dumps(rows))
    prompt = make("qa_2", Setting(tokenizer, files={"hotpotqa": tmp_path / "hotpot.json"}), 1024, 2)
    assert all(f"title 2 {k}\nOne. Two." in content(prompt) for k in range(3))
    assert prompt.references == ("a2",)


def test_a_file_of_another_kind_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(InputError, match="no SQuAD file"):
        make("qa_1", Setting(tokenizer, files={"squad": tmp_path / "x.json"}))
    with pytest.raises(InputError, match="--file squad=PATH"):
        make("qa_1", Setting(tokenizer))


def test_prose_is_the_users_and_starts_again_when_it_ends(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Call me Ishmael. Some years ago. " * 5)
    prompt = make("niah_single_2", Setting(tokenizer, files={"prose": tmp_path / "book.txt"}), 2048)
    text = content(prompt)
    assert text.count("Ishmael.") > 5
    assert prompt.facts["haystack"] == "book.txt" and prompt.facts["label"] == "ruler-like"


def test_generated_prose_has_no_number_and_no_magic(setting: Setting) -> None:
    prompt = make("niah_single_2", setting)
    hay = NEEDLE.sub("", content(prompt)).split("afterwards.\n")[1].split("\nWhat is")[0]
    assert not re.search(r"\d|magic|special", hay)


def test_opencompass_ends_the_users_turn_with_the_answers_start(tokenizer: Any) -> None:
    ours, theirs = Setting(tokenizer), Setting(tokenizer, style="opencompass")
    for name in GENERATED:
        assert make(name, ours).prefix and not make(name, theirs).prefix
    assert content(make("fwe", theirs)).endswith("words are:")
    # it splits prose at full stops and leaves them out
    assert ". " not in NEEDLE.sub("", content(make("niah_single_2", theirs)).split("afterwards.\n")[1])


def test_lm_eval_drops_the_solved_list_and_spells_assigned_its_own_way(tokenizer: Any) -> None:
    setting = Setting(tokenizer, style="lm-eval")
    assert content(make("cwe", setting)).count("Below is a numbered list") == 1
    assert make("vt", setting).prefix.endswith("they are:") and "assgined" in make("vt", setting).prefix


def prompt_of(*references: str) -> Prompt:
    return Prompt((), references, 1)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("1234567 and 7654321", 1.0),
        ("it is 1234567.", 0.5),
        ("", 0.0),
        ("12345 67", 0.0),
        ("\x00 1234567\x1f7654321", 1.0),
    ],
)
def test_each_reference_counts_once_wherever_it_stands(answer: str, score: float) -> None:
    assert match_all(prompt_of("1234567", "7654321"), answer, "nvidia") == score


def test_letters_case_does_not_matter() -> None:
    assert match_all(prompt_of("ABCDE"), "abcde", "nvidia") == 1.0


def test_one_of_several_spellings_is_right_but_a_third_for_lm_eval() -> None:
    sample = prompt_of("Denver Broncos", "The Broncos", "Broncos, Denver")
    assert match_any(sample, "the denver broncos", "nvidia") == 1.0
    assert match_any(sample, "the denver broncos", "opencompass") == 1.0
    assert match_any(sample, "the denver broncos", "lm-eval") == pytest.approx(1 / 3)
    assert match_any(sample, "Carolina", "nvidia") == 0.0
