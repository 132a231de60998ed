"""Counting: RULER's most common words (`cwe`) and most frequent coded words (`fwe`)."""

import math
import random
import string
from dataclasses import dataclass

import numpy as np

from sala.eval.ruler.fit import Draft, first_that_fits, fit
from sala.eval.ruler.niah import with_prefix
from sala.eval.ruler.words import Words
from sala.eval.task import Prompt, Setting

COMMON_TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
    "most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON_NEW_TOKENS, COMMON = 120, 10
# below this length words are repeated less
SHORT = 4096

CODED_TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded "
    "words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text?"
)
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
CODED_NEW_TOKENS, CODED_LETTERS, ALPHA = 50, 6, 2.0
ZETA = math.pi**2 / 6
# the third word has to come up oftener than the fourth
LEAST_CODED = 40


@dataclass(frozen=True, slots=True)
class Counts:
    """How often words come up: the ten common ones and the others, in the list and in its solved example of `shown` words."""

    often: int
    seldom: int
    shown: int = 0
    shown_often: int = 0
    shown_seldom: int = 0


LONG_LIST, SHORT_LIST = Counts(30, 3, 40, 10, 3), Counts(6, 1, 20, 3, 1)
# for lengths that the definition does not fit into
SMALLEST_LIST = Counts(2, 1)


def make_common(setting: Setting, length: int, index: int) -> Prompt:
    kinds = [SHORT_LIST, SMALLEST_LIST] if length < SHORT else [LONG_LIST, SHORT_LIST, SMALLEST_LIST]
    return first_that_fits([_common(setting, length, index, kind, kind == kinds[0]) for kind in kinds], setting, length)


def _common(setting: Setting, length: int, index: int, counts: Counts, as_defined: bool) -> Draft:
    rng = setting.rng("cwe", length, index)
    words = Words(rng)
    # the example's words are not those of the list
    skipped = counts.shown
    solved = ""
    if counts.shown and setting.style != "lm-eval":
        shown = words.first(counts.shown)
        context = _list(shown, counts.shown_often, counts.shown_seldom, rng)
        solved = COMMON_TEMPLATE.format(context=context) + COMMON_PREFIX + _numbered(shown[:COMMON]) + "\n"
    order_seed = rng.random()

    def build(number: int) -> Prompt:
        drawn = words.first(skipped + number)[skipped:]
        context = _list(drawn, counts.often, counts.seldom, random.Random(order_seed))
        listed = skipped + number <= words.listed
        facts = {"label": "ruler" if listed and as_defined else "ruler-like", "haystack": "words"}
        text = solved + COMMON_TEMPLATE.format(context=context)
        return with_prefix(text, COMMON_PREFIX, tuple(drawn[:COMMON]), COMMON_NEW_TOKENS, (), facts, setting)

    def unit(i: int) -> str:
        word = words.first(skipped + i + 1)[skipped + i]
        return "".join(f" {i * counts.seldom + k}. {word}" for k in range(counts.seldom))

    return Draft(build, unit, COMMON, additive=False)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _list(words: list[str], often: int, seldom: int, rng: random.Random) -> str:
    entries = words[:COMMON] * often + words[COMMON:] * seldom
    rng.shuffle(entries)
    return _numbered(entries)


def make_coded(setting: Setting, length: int, index: int) -> Prompt:
    rng = setting.rng("fwe", length, index)
    size = max(4, length // 50)
    coded: dict[str, None] = {}
    while len(coded) < size:
        coded["".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))] = None
    vocabulary = ["...", *list(coded)[1:]]
    shares = np.arange(1, size + 1) ** -ALPHA / ZETA
    order_seed = rng.random()
    typical = rng.choices(vocabulary, weights=list(shares), k=length)

    def build(number: int) -> Prompt:
        counts = (number * shares).astype(int)
        text = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        random.Random(order_seed).shuffle(text)
        facts = {"label": "ruler", "haystack": "coded words"}
        prompt = CODED_TEMPLATE.format(context=" ".join(text))
        return with_prefix(prompt, CODED_PREFIX, tuple(vocabulary[1:4]), CODED_NEW_TOKENS, (), facts, setting)

    return fit(Draft(build, lambda i: " " + typical[i], LEAST_CODED, additive=False), setting, length)
