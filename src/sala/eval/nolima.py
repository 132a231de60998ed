"""Needles that share no word with their question, as in NoLiMa (arXiv 2502.05167); own associations, or its own files."""

import json
import random
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from sala.errors import InputError
from sala.eval.ruler.fit import Draft, fit
from sala.eval.ruler.prose import prose_of, sentences
from sala.eval.task import Prompt, Setting, Style, Task, ask

GROUP, FILE = "nolima", "nolima"
NEW_TOKENS = 32
DEPTHS = 26
NAMES = ("Abena", "Bodil", "Ciro", "Danuta", "Edvin", "Farah", "Goran", "Hina", "Ilse", "Jovan", "Kalani", "Lucja")
TEMPLATE = (
    "Below is a long text. Read it, then answer a question about it.\n\n{context}\n\nQuestion: {question}\nGive only the "
    "final answer, without any explanation."
)
# (what the text says, what is asked): nothing but knowledge connects the two
ASSOCIATIONS = (
    ("From the kitchen, {name} can see the Brandenburg Gate.", "Which character lives in Germany?"),
    ("{name} takes the ferry past the Statue of Liberty every morning.", "Which character lives in New York?"),
    ("{name} still misses the noise of the Grand Bazaar in the evenings.", "Which character has been to Turkey?"),
    (
        "For eleven years {name} has not eaten anything that once had a face.",
        "Which character would not order the steak?",
    ),
    ("{name} checks the insulin before every supper.", "Which character has diabetes?"),
    ("{name} spends the evenings putting new strings on the cello.", "Which character plays a musical instrument?"),
    ("{name} comes home with sawdust in both sleeves.", "Which character works with wood?"),
    ("{name} keeps the bees away from the children.", "Which character could bring some honey?"),
    ("{name} asked for the loaf without gluten again.", "Which character does not tolerate wheat?"),
    ("{name} reads every page with the fingertips.", "Which character is blind?"),
)


@dataclass(frozen=True, slots=True)
class Association:
    needle: str
    question: str
    template: str = TEMPLATE
    names: tuple[str, ...] = NAMES
    label: str = "nolima-like"


def associations(setting: Setting) -> list[Association]:
    if FILE not in setting.files:
        return [Association(needle, question) for needle, question in ASSOCIATIONS]
    return read_official(setting.file(FILE))


def read_official(path: Path) -> list[Association]:
    """Read NoLiMa's `needle_set.json`: an association for every needle, question and test."""
    try:
        found = [association for entry in json.loads(path.read_text("utf-8")) for association in _entries(entry)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(path)!r} is no needle set of NoLiMa ({error!r}); expected its needle_set.json"
        ) from error
    return found


def _entries(entry: dict[str, Any]) -> list[Association]:
    def filled(text: str, arguments: list[str]) -> str:
        for number, argument in enumerate(arguments, 1):
            text = text.replace(f"{{{number}}}", argument)
        return text

    return [
        Association(
            filled(entry["needle"], test["input_args"]).replace("{CHAR}", "{name}"),
            filled(question, test["input_args"]),
            _template(entry.get("task_template")),
            tuple(entry["character_set"]),
            "nolima",
        )
        for question in entry["questions"].values()
        for test in entry["tests"].values()
    ]


def _template(text: str | None) -> str:
    return TEMPLATE if text is None else text.replace("{haystack}", "{context}")


def make(setting: Setting, length: int, index: int) -> Prompt:
    """Return a text with one needle at one of 26 depths; associations come in turns, each at every depth."""
    known = setting.keep("associations", lambda: associations(setting))
    chosen = known[(index // DEPTHS + index) % len(known)]
    depth = index % DEPTHS / (DEPTHS - 1)
    name = random.Random(f"{setting.seed}/nolima/{index}").choice(chosen.names)
    needle = chosen.needle.replace("{name}", name)
    prose = prose_of(setting)

    def build(number: int) -> Prompt:
        context = _insert(sentences(" ".join(prose.first(number))), needle, depth)
        text = chosen.template.replace("{question}", chosen.question).replace("{context}", context)
        facts = {"depths": [round(depth, 4)], "label": chosen.label, "haystack": prose.source}
        return Prompt(ask(text), (name,), NEW_TOKENS, "", (needle,), facts)

    return fit(Draft(build, lambda i: " " + prose.word(i), 1, additive=False), setting, length)


def _insert(parts: list[str], needle: str, depth: float) -> str:
    """Put the needle at the end of the sentence nearest to a depth by characters."""
    ends = list(accumulate(len(part) + 1 for part in parts))
    place = bisect_left(ends, depth * ends[-1])
    return " ".join([*parts[:place], needle, *parts[place:]])


def contains(sample: Prompt, answer: str, style: Style) -> float:
    """Return 1 if the name is in the answer, in its own letters' case."""
    return float(sample.references[0] in answer)


TASKS = (Task("nolima", make, contains, GROUP),)
