"""Needles in a haystack: RULER's eight retrieval tasks."""

import random
import uuid
from dataclasses import dataclass
from typing import Literal

from sala.eval.ruler.fit import Draft, fit
from sala.eval.ruler.prose import prose_of, sentences
from sala.eval.ruler.words import pair
from sala.eval.task import Prompt, Setting, ask

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
NEW_TOKENS = 128
# depths of needles in prose, percent
DEPTHS = tuple(round(100 * i / 39) for i in range(40))

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True, slots=True)
class Needles:
    """One of RULER's rows: what the haystack is, and how many keys, values of a key, and asked keys there are."""

    haystack: Literal["noise", "prose", "needles"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


ROWS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("prose"),
    "niah_single_3": Needles("prose", value="uuids"),
    "niah_multikey_1": Needles("prose", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles("prose", values=4),
    "niah_multiquery": Needles("prose", keys=4, queries=4),
}


class Distinct:
    """Random keys or values, no two the same."""

    def __init__(self, rng: random.Random):
        self.rng, self._seen = rng, set[str]()

    def draw(self, kind: Kind) -> str:
        while True:
            drawn = _draw(kind, self.rng)
            if drawn not in self._seen:
                self._seen.add(drawn)
                return drawn


def make_needles(name: str, row: Needles, setting: Setting, length: int, index: int) -> Prompt:
    rng = setting.rng(name, length, index)
    distinct = Distinct(rng)
    keys = [distinct.draw(row.key) for _ in range(row.keys)]
    values = {key: [distinct.draw(row.value) for _ in range(row.values)] for key in keys}
    needles = [NEEDLE.format(kind=row.value, key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    asked = rng.sample(keys, row.queries)
    answers = tuple(value for key in asked for value in values[key])
    evidence = tuple(needle for needle in needles if any(needle.endswith(f" {value}.") for value in answers))
    others: list[str] = []
    prose = prose_of(setting) if row.haystack == "prose" else None
    places_seed = rng.random()

    def unit(i: int) -> str:
        if prose is not None:
            return " " + prose.word(i)
        if row.haystack == "noise":
            return "\n" + NOISE
        while len(others) <= i:
            others.append(NEEDLE.format(kind=row.value, key=distinct.draw(row.key), value=distinct.draw(row.value)))
        return "\n" + others[i]

    def build(number: int) -> Prompt:
        places = random.Random(places_seed)
        if prose is not None:
            context, depths = _in_prose(prose.first(number), needles, places, setting.style)
        else:
            lines = [unit(i)[1:] for i in range(number)]
            context, depths = _in_lines(lines, needles, places)
        facts = {
            "depths": [round(depth, 4) for needle, depth in zip(needles, depths, strict=True) if needle in evidence],
            "label": "ruler-like" if prose is not None else "ruler",
            "haystack": prose.source if prose is not None else row.haystack,
        }
        return _write(row, context, asked, answers, evidence, facts, setting)

    least = row.keys * row.values
    return fit(Draft(build, unit, least, additive=prose is None), setting, length)


def _write(
    row: Needles,
    context: str,
    asked: list[str],
    answers: tuple[str, ...],
    evidence: tuple[str, ...],
    facts: dict,
    setting: Setting,
) -> Prompt:
    kind, template, prefix = row.value, TEMPLATE, PREFIX
    if row.queries * row.values == 1:
        kind = kind[:-1]  # type: ignore[assignment]
        template, prefix = (
            text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in (template, prefix)
        )
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    # the context last: it may have braces
    text = template.replace("{kind}", kind).replace("{query}", query).replace("{context}", context)
    return with_prefix(text, prefix.format(kind=kind, query=query), answers, NEW_TOKENS, evidence, facts, setting)


def with_prefix(
    text: str,
    prefix: str,
    answers: tuple[str, ...],
    new_tokens: int,
    evidence: tuple[str, ...],
    facts: dict,
    setting: Setting,
) -> Prompt:
    """Return the prompt with the answer's start where the style has it: OpenCompass ends the user's turn with it."""
    if setting.style == "opencompass":
        text, prefix = text + prefix, ""
    return Prompt(ask(text), answers, new_tokens, prefix, evidence, facts)


def _in_lines(lines: list[str], needles: list[str], rng: random.Random) -> tuple[str, list[float]]:
    """Insert needles between lines; return the text and the depth of each needle, 0 the start and 1 the end."""
    places = sorted(rng.sample(range(len(lines) + 1), len(needles)))
    parts: list[str] = []
    before = 0
    for place, needle in zip(places, needles, strict=True):
        parts += [*lines[before:place], needle]
        before = place
    return "\n".join([*parts, *lines[before:]]), [place / max(1, len(lines)) for place in places]


def _in_prose(words: list[str], needles: list[str], rng: random.Random, style: str) -> tuple[str, list[float]]:
    """Insert needles between sentences at some of the 40 depths."""
    text = " ".join(words)
    if style == "opencompass":
        # it splits at this and never puts it back
        parts = [sentence.strip() for sentence in text.split(". ") if sentence]
    else:
        parts = sentences(text)
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    pieces: list[str] = []
    before = 0
    for depth, needle in zip(depths, needles, strict=True):
        place = int(len(parts) * depth / 100)
        pieces += [*parts[before:place], needle]
        before = place
    return " ".join([*pieces, *parts[before:]]), [depth / 100 for depth in depths]


def _draw(kind: Kind, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        return pair(rng)
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
