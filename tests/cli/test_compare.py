"""`sala compare`: the answers are those of `sala generate`, one block a model under each prompt."""

import json

MODELS = ("embedded-teacher", "embedded-hybrid")
PROMPT = "def read(path):"


def test_each_model_answers_as_it_does_alone(sala, tmp_path):
    book = tmp_path / "book.py"
    book.write_text("x = 1\n" * 20)
    asked = ("--prompt", PROMPT, "--file", book, "-n", "6")
    said = json.loads(sala("compare", *MODELS, *asked, "--json").out)
    assert [one["model"] for one in said] == list(MODELS)
    for one in said:
        alone = sala("generate", "--model", one["model"], *asked, "--temperature", "0").out
        assert one["text"] == alone.strip() and one["prompt"] == PROMPT


def test_a_prompt_stands_above_its_answers(sala):
    lines = sala("compare", *MODELS, "-p", "x = 1", "-p", PROMPT, "-n", "2").out.splitlines()
    named = [line.partition(" (")[0] for line in lines if line.startswith((">", *MODELS))]
    assert named == ["> x = 1", *MODELS, f"> {PROMPT}", *MODELS]


def test_one_model_is_nothing_to_compare(sala):
    outcome = sala("compare", MODELS[0], "-p", "x")
    assert outcome.code == 2 and "1 model; expected two checkpoints or more" in outcome.err
