"""Looking up and following symbols across a tree of Python files."""

import random
import string
from dataclasses import dataclass
from functools import partial

from sala.data import library_documents
from sala.eval.ruler.fit import Draft, fit
from sala.eval.ruler.scoring import match_all
from sala.eval.task import Prompt, Setting, Task, ask

GROUP = "code"
NEW_TOKENS, CHAINS = 24, 4
TEMPLATE = (
    "Below are the files of a source tree, each under a line with its path.\n\n{context}\n\nQuestion: What number does "
    "`{name}()` in {path} return?"
)
PREFIX = " Answer: It returns"


@dataclass(frozen=True, slots=True)
class Chain:
    """Functions that call one another across files; the last returns the number. names, paths: from the first on."""

    names: tuple[str, ...]
    paths: tuple[str, ...]
    number: str

    def files(self) -> list[str]:
        """Return the text of each file."""
        last = len(self.names) - 1
        texts = []
        for i, (name, path) in enumerate(zip(self.names, self.paths, strict=True)):
            if i == last:
                texts.append(f"# {path}\ndef {name}():\n    return {self.number}\n")
            else:
                module, called = self.paths[i + 1].removesuffix(".py").replace("/", "."), self.names[i + 1]
                texts.append(f"# {path}\nfrom {module} import {called}\n\n\ndef {name}():\n    return {called}()\n")
        return texts


def make(hops: int, setting: Setting, length: int, index: int) -> Prompt:
    """Return real source files with several chains of `hops` calls among them, in any order, and ask for one chain's number."""
    rng = setting.rng("code", hops, length, index)
    chains = _chains(rng, hops)
    asked = chains[0]
    inserted = [text for chain in chains for text in chain.files()]
    rng.shuffle(inserted)
    lines, begins = setting.keep("source", _source)
    places_seed = rng.random()
    first = rng.choice(begins)
    starts = [(begin - first) % len(lines) for begin in begins]

    def line(i: int) -> str:
        return lines[(first + i) % len(lines)]

    def build(number: int) -> Prompt:
        between = [start for start in starts if start < number] or [0]
        places = sorted(random.Random(places_seed).choices(between, k=len(inserted)))
        parts: list[str] = []
        before = 0
        for place, text in zip(places, inserted, strict=True):
            parts += [*map(line, range(before, place)), text]
            before = place
        context = "\n".join([*parts, *map(line, range(before, number))])
        text = (
            TEMPLATE.replace("{name}", asked.names[0]).replace("{path}", asked.paths[0]).replace("{context}", context)
        )
        final = asked.files()[-1]
        depth = places[inserted.index(final)] / max(1, number)
        facts = {"depths": [round(depth, 4)], "haystack": "Python's library"}
        return Prompt(ask(text), (asked.number,), NEW_TOKENS, PREFIX, (final,), facts)

    return fit(Draft(build, lambda i: "\n" + line(i), 0, additive=False), setting, length)


def _chains(rng: random.Random, hops: int) -> list[Chain]:
    used: set[str] = set()

    def word() -> str:
        while True:
            drawn = "".join(rng.choices(string.ascii_lowercase, k=6))
            if drawn not in used:
                used.add(drawn)
                return drawn

    def chain() -> Chain:
        names = tuple(f"get_{word()}" for _ in range(hops))
        paths = tuple(f"app/{word()}/{word()}.py" for _ in range(hops))
        return Chain(names, paths, str(rng.randint(10**6, 10**7 - 1)))

    return [chain() for _ in range(CHAINS)]


def _source() -> tuple[list[str], list[int]]:
    """Return the lines of the library's test documents, and where each document begins."""
    lines: list[str] = []
    begins = []
    for document in library_documents("test"):
        begins.append(len(lines))
        lines += [f"# {document.name}", *document.text.splitlines()]
    return lines, begins


TASKS = (
    Task("code_lookup", partial(make, 1), match_all, GROUP),
    Task("code_hops", partial(make, 3), match_all, GROUP),
)
