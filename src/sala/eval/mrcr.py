"""MRCR: which of several equal requests in a long conversation was meant (openai/mrcr's structure, files and score)."""

import json
import random
import string
from collections.abc import Iterator
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

from sala.errors import InputError
from sala.eval.ruler.fit import Draft, fit
from sala.eval.task import Prompt, Setting, Style, Task

GROUP, FILE = "mrcr", "mrcr"
FORMATS = (
    "poem",
    "short story",
    "letter",
    "riddle",
    "news article",
    "speech",
    "diary entry",
    "song",
    "advertisement",
    "recipe",
)
TOPICS = (
    "rivers", "clocks", "gardens", "bridges", "owls", "lanterns", "trains", "mirrors", "storms", "bakeries", "islands",
    "kites", "libraries", "mountains", "candles", "harbours", "orchards", "maps", "violins", "snow",
)  # fmt: skip
_OPENINGS = (
    "Once",
    "At dawn",
    "In the north",
    "Before the war",
    "Last spring",
    "Near the border",
    "On a quiet day",
    "Far away",
)
_VERBS = (
    "changed",
    "followed",
    "forgave",
    "measured",
    "remembered",
    "repaired",
    "sold",
    "carried",
    "watched",
    "invented",
)
_PEOPLE = (
    "a baker",
    "two sisters",
    "the old captain",
    "a student",
    "my neighbour",
    "the night guard",
    "a tailor",
    "the choir",
)
_ENDINGS = (
    "and nobody minded",
    "without a word",
    "for a single coin",
    "and laughed",
    "until the bells rang",
    "in the rain",
)
LINES = (4, 9)
HASH_SIZE = 10
SPARE_TOKENS = 16


def make_generated(needles: int, setting: Setting, length: int, index: int) -> Prompt:
    """Return a conversation of pairs, of which `needles` make the same request and get different answers."""
    rng = setting.rng("mrcr", needles, length, index)
    subject = rng.choice(FORMATS), rng.choice(TOPICS)
    wanted = [_piece(rng, *subject) for _ in range(needles)]
    which, marker = rng.randrange(needles), "".join(rng.choices(string.ascii_letters + string.digits, k=HASH_SIZE))
    answer = marker + wanted[which]
    new_tokens = setting.sizes([answer])[0] + SPARE_TOKENS
    others: list[tuple[tuple[str, str], str]] = []
    order_seed = rng.random()

    def other(i: int) -> tuple[tuple[str, str], str]:
        while len(others) <= i:
            about = rng.choice(FORMATS), rng.choice(TOPICS)
            if about != subject:
                others.append((about, _piece(rng, *about)))
        return others[i]

    def build(number: int) -> Prompt:
        places = sorted(random.Random(order_seed).sample(range(number + needles), needles))
        own_places = set(places)
        fillers, own = iter(range(number)), iter(wanted)
        pairs = [(subject, next(own)) if i in own_places else other(next(fillers)) for i in range(number + needles)]
        messages = [message for about, text in pairs for message in _turns(about, text)]
        messages.append({"role": "user", "content": _final(marker, which, subject)})
        facts = {"label": "mrcr-synth", "marker": marker, "depths": [round(places[which] / (number + needles), 4)]}
        return Prompt(tuple(messages), (answer,), new_tokens, "", (wanted[which],), facts)

    def unit(i: int) -> str:
        about, text = other(i)
        return "\n\n".join(["", *(f"{m['role'].capitalize()}: {m['content']}" for m in _turns(about, text))])

    return fit(Draft(build, unit, 0, additive=False), setting, length)


def _turns(about: tuple[str, str], text: str) -> list[dict[str, str]]:
    kind, topic = about
    return [{"role": "user", "content": f"Write a {kind} about {topic}."}, {"role": "assistant", "content": text}]


def _final(marker: str, which: int, subject: tuple[str, str]) -> str:
    kind, topic = subject
    return (
        f"Prepend {marker} to the {_ordinal(which + 1)} (1 indexed) {kind} about {topic}. Do not include any other text in "
        "your response."
    )


def _ordinal(number: int) -> str:
    return f"{number}" + {1: "st", 2: "nd", 3: "rd"}.get(number, "th")


def _piece(rng: random.Random, kind: str, topic: str) -> str:
    lines = [
        f"{rng.choice(_OPENINGS)} {rng.choice(_PEOPLE)} {rng.choice(_VERBS)} the {topic} {rng.choice(_ENDINGS)}."
        for _ in range(rng.randint(*LINES))
    ]
    return f"A {kind}. " + " ".join(lines)


def make_official(needles: int, setting: Setting, length: int, index: int) -> Prompt:
    """Return a row of the official data: the index-th whose prompt and answer have length / 2 to length tokens."""
    rows = setting.keep(("mrcr", needles, length), lambda: list(_binned(needles, setting, length)))
    if index >= len(rows):
        raise InputError(
            f"the MRCR file has {len(rows)} rows of {needles} needles with {length // 2:,} to {length:,} tokens; expected "
            "that many samples or fewer"
        )
    return rows[index]


def _binned(needles: int, setting: Setting, length: int) -> Iterator[Prompt]:
    for row in setting.keep("mrcr", lambda: list(_rows(setting.file(FILE)))):
        # four characters a token is a low estimate; what is far too long is not encoded
        if row["n_needles"] != needles or len(row["prompt"]) > 8 * length:
            continue
        messages, answer = json.loads(row["prompt"]), row["answer"]
        new_tokens = setting.sizes([answer])[0] + SPARE_TOKENS
        facts = {"label": "mrcr", "marker": row["random_string_to_prepend"]}
        prompt = Prompt(tuple(messages), (answer,), new_tokens, "", (), facts)
        if length // 2 < setting.count(prompt) + new_tokens <= length:
            yield prompt


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            yield from parquet.read_table(path).to_pylist()
        else:
            yield from (json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip())
    except ImportError as error:
        raise InputError("a .parquet file needs pyarrow; expected pip install 'sala[parquet]'") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is no MRCR file ({error}); expected .parquet or JSON lines") from error


def make(needles: int, setting: Setting, length: int, index: int) -> Prompt:
    kind = make_official if FILE in setting.files else make_generated
    return kind(needles, setting, length, index)


def score(sample: Prompt, answer: str, style: Style) -> float:
    """Return 0 unless the answer begins with the marker, else how alike the rest and the reference are."""
    marker, [reference] = sample.facts["marker"], sample.references
    if not answer.startswith(marker):
        return 0.0
    return SequenceMatcher(None, answer.removeprefix(marker), reference.removeprefix(marker)).ratio()


TASKS = tuple(
    Task(f"mrcr_{needles}n", partial(make, needles), score, GROUP, measure="share alike") for needles in (2, 4, 8)
)
