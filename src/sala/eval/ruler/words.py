"""Words of RULER's tasks: those of the `wonderwords` package, and made-up ones where these run out."""

import random
from functools import cache
from importlib import resources
from itertools import count

from sala.errors import InputError

_ONSETS = (
    "b",
    "br",
    "ch",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "v",
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_CODAS = ("", "l", "n", "r", "s", "nd", "rk")


@cache
def listed(kind: str) -> tuple[str, ...]:
    """Return the words of one kind ("noun", "adjective", "verb"), sorted.

    Raises:
        InputError: the package is not installed.
    """
    try:
        file = resources.files("wonderwords") / "assets" / f"{kind}list.txt"
    except ModuleNotFoundError as error:
        raise InputError("RULER's words come with wonderwords; expected pip install 'sala[eval]'") from error
    return tuple(sorted({word for line in file.read_text("utf-8").splitlines() if (word := line.strip())}))


@cache
def common_words() -> tuple[str, ...]:
    """Return RULER's list for counting: nouns, adjectives and verbs."""
    return tuple(sorted({*listed("noun"), *listed("adjective"), *listed("verb")}))


def pair(rng: random.Random) -> str:
    """Return an adjective and a noun, as RULER's keys are."""
    return f"{rng.choice(listed('adjective'))}-{rng.choice(listed('noun'))}"


@cache
def _made_up(block: int, size: int = 4096) -> tuple[str, ...]:
    rng = random.Random(f"words/{block}")
    words = []
    for _ in range(size):
        syllables = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.randint(2, 3)))
        words.append("".join(syllables))
    return tuple(words)


class Words:
    """RULER's words in random order, without repetition; made-up ones follow the last."""

    def __init__(self, rng: random.Random):
        self._words = list(common_words())
        self.listed = len(self._words)
        rng.shuffle(self._words)
        self._seen = set(self._words)
        self._blocks = count()

    def first(self, number: int) -> list[str]:
        while len(self._words) < number:
            fresh = [word for word in dict.fromkeys(_made_up(next(self._blocks))) if word not in self._seen]
            self._seen.update(fresh)
            self._words += fresh
        return self._words[:number]
