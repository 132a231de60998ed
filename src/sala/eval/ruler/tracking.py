"""Variable tracking: chains of assignments in noise, RULER's `vt`."""

import random
import string
from functools import partial
from itertools import pairwise

from sala.eval.ruler.fit import Draft, first_that_fits
from sala.eval.ruler.niah import NOISE, with_prefix
from sala.eval.task import Prompt, Setting

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all "
    "variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned the value "
    "{value}, they are: "
)
NEW_TOKENS, HOPS, LETTERS = 30, 4, 5
EXAMPLE_NOISE, EXAMPLE_LETTERS = 5, 3


def make_tracking(setting: Setting, length: int, index: int) -> Prompt:
    rng = setting.rng("vt", length, index)
    names, value = _chain(rng, LETTERS)
    solved = _example(rng, setting)
    places_seed = rng.random()

    def build(example: str, label: str, number: int) -> Prompt:
        context, depths = _hide(_assignments(names, value), number, random.Random(places_seed), setting.style)
        facts = {"depths": depths, "label": label, "haystack": "noise"}
        first = f"VAR {names[0]} = {value}"
        text = example + TEMPLATE.format(context=context, value=value)
        return with_prefix(text, _prefix(value, setting), tuple(names), NEW_TOKENS, (first,), facts, setting)

    joined = " " if setting.style != "nvidia" else ""
    # without its example the task fits into 512 tokens
    kinds = ((solved, "ruler"), ("", "ruler-like"))
    drafts = [Draft(partial(build, *kind), lambda i: f"\n{joined}{NOISE}", HOPS + 1) for kind in kinds]
    return first_that_fits(drafts, setting, length)


def _prefix(value: str, setting: Setting) -> str:
    prefix = PREFIX.format(number=HOPS + 1, value=value)
    # as it is spelled there, without the space at the end
    return prefix.replace("assigned", "assgined").rstrip() if setting.style == "lm-eval" else prefix


def _chain(rng: random.Random, letters: int) -> tuple[list[str], str]:
    """Return the names of one chain, all different, and its value."""
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names), str(rng.randint(10_000, 99_999))


def _assignments(names: list[str], value: str) -> list[str]:
    return [
        f"VAR {names[0]} = {value}",
        *(f"VAR {new} = VAR {old} " for old, new in pairwise(names)),
    ]


def _hide(lines: list[str], noise: int, rng: random.Random, style: str) -> tuple[str, list[float]]:
    """Insert the chain, in its order, between sentences of noise."""
    places = sorted(rng.sample(range(noise), len(lines)))
    parts: list[str] = []
    before = 0
    for place, line in zip(places, lines, strict=True):
        parts += [NOISE] * (place - before) + [line]
        before = place
    parts += [NOISE] * (noise - before)
    if style == "nvidia":
        return "\n".join(parts), [round(place / noise, 4) for place in places]
    # noise ends its line, a chain's link does not
    text = " ".join(part + "\n" if part == NOISE else part for part in parts)
    return text, [round(place / noise, 4) for place in places]


def _example(rng: random.Random, setting: Setting) -> str:
    """Return one solved question with names of three letters; OpenCompass gives none."""
    if setting.style == "opencompass":
        return ""
    names, value = _chain(rng, EXAMPLE_LETTERS)
    context, _ = _hide(_assignments(names, value), EXAMPLE_NOISE, rng, setting.style)
    question = TEMPLATE.format(context=context, value=value) + _prefix(value, setting).rstrip()
    return f"{question} {' '.join(names)}\n\n"
