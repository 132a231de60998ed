"""Prose to hide needles in: a file of the user's, or sentences from a small grammar."""

import random
import re
from collections.abc import Iterator

from sala.eval.ruler.words import listed
from sala.eval.task import Setting

_PATTERNS = (
    "The {a} {n} was {a2}, and the {n2} beside it was not.",
    "Nobody in the {n} remembered why the {a} {n2} had been left there.",
    "When the {n} came back, they spoke about the {a} {n2} for a long time.",
    "A {n} is seldom as {a} as a {n2}, although many people think so.",
    "She had once seen a {a} {n} near the {n2}, but she told no one.",
    "It takes a {a} {n} to make a {n2} look {a2}.",
    "After the {n}, the {a} {n2} seemed smaller than before.",
    "Most of what we know about the {n} comes from a {a} {n2}.",
    "He asked for the {n}; what he got was a {a} {n2} and good advice.",
    "In the end the {a} {n} was worth more than the {n2}.",
    "There are {a} reasons to keep a {n}, and {a2} ones to give away the {n2}.",
    "If the {n} were {a}, the {n2} would be {a2} too.",
)
_GENERATED_SEED = 7


def generated_words() -> Iterator[str]:
    """Yield the words of endless sentences, the same every time; no digits, and nothing about magic."""
    rng = random.Random(_GENERATED_SEED)
    nouns = [word for word in listed("noun") if word.isalpha() and word.islower()]
    adjectives = [word for word in listed("adjective") if word.isalpha() and word not in ("special", "magic")]
    while True:
        (n, n2), (a, a2) = rng.sample(nouns, 2), rng.sample(adjectives, 2)
        yield from rng.choice(_PATTERNS).format(n=n, n2=n2, a=a, a2=a2).split()


class Prose:
    """The words of a text, as many as one likes; a file that is too short starts again."""

    def __init__(self, setting: Setting):
        path = setting.files.get("prose")
        self.source = "generated" if path is None else path.name
        self._words: list[str] = [] if path is None else setting.read("prose").split()
        self._read = len(self._words)
        self._more = generated_words() if path is None else None

    def first(self, number: int) -> list[str]:
        while len(self._words) < number:
            if self._more is None:
                self._words += self._words[: self._read]
            else:
                self._words += [next(self._more) for _ in range(max(4096, number - len(self._words)))]
        return self._words[:number]

    def word(self, index: int) -> str:
        return self.first(index + 1)[index] if index >= len(self._words) else self._words[index]


def prose_of(setting: Setting) -> Prose:
    return setting.keep("prose", lambda: Prose(setting))


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?]) ", text)
