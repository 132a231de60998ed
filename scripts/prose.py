"""Count the sentences of the pages that a person reads, and refuse pages whose sentences are too long.

    python scripts/prose.py [FILE ...]

Without files it counts PAGES. It prints a row for each file and a total. It exits with 1 where a file is over a bar (MEAN_WORDS,
LONG_SHARE), and then prints that file's longest sentences.

Text is paragraphs and list items. Code blocks, tables, headings, images and comments are left out. A sentence ends at `.`, `!`,
`?` or `:` before a space and the beginning of another sentence (an upper-case letter, a digit, inline code or a link). It also
ends with its paragraph or list item. A semicolon ends no sentence. A word is a run without spaces that holds a letter or a digit.
Inline code counts as one word, a link as its text. Labels of one or two words, such as a bold `Memory.`, are not counted.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/*.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")

MEAN_WORDS = 16.0
LONG_WORDS = 30
LONG_SHARE = 0.05
LABEL_WORDS = 2
WORST_SHOWN = 5

FENCED = re.compile(r"^[ ]*```.*?^[ ]*```[ ]*$|<!--.*?-->", re.MULTILINE | re.DOTALL)
NOT_TEXT = re.compile(r"\s*(?:\||#|!\[)")
ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
CODE = re.compile(r"(`+).+?\1")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
END = re.compile(r"(?<=[.!?:])(?<!\be\.g\.)(?<!\bi\.e\.)\s+(?=[\"'(\[]*[A-Z0-9])")


class Count(NamedTuple):
    """How many sentences there are, how many words they have, and how many of them are long."""

    sentences: int
    words: int
    long: int

    @property
    def mean(self) -> float:
        """Words a sentence."""
        return self.words / max(self.sentences, 1)

    @property
    def long_share(self) -> float:
        """The part of sentences with more than LONG_WORDS words."""
        return self.long / max(self.sentences, 1)

    @property
    def passes(self) -> bool:
        """Whether both bars are met."""
        return self.mean <= MEAN_WORDS and self.long_share <= LONG_SHARE


def paragraphs(markdown: str) -> Iterator[str]:
    """Yield each paragraph and each list item of a page, on one line."""
    for block in re.split(r"\n\s*\n", FENCED.sub("\n\n", markdown)):
        lines = block.strip("\n").splitlines()
        if all(line.startswith("    ") for line in lines):
            continue
        text = ""
        for line in lines:
            if ITEM.match(line) or NOT_TEXT.match(line):
                yield text
                text = ""
            if not NOT_TEXT.match(line):
                text += " " + ITEM.sub("", line, count=1).strip()
        yield text


def sentences(markdown: str) -> list[str]:
    """Return the sentences of a page, inline code as the word `Code`, without labels."""
    found = []
    for paragraph in paragraphs(markdown):
        plain = LINK.sub(r"\1", CODE.sub("Code", paragraph)).replace("*", "").replace("_", "")
        found += [sentence.strip() for sentence in END.split(plain)]
    return [sentence for sentence in found if words(sentence) > LABEL_WORDS]


def words(sentence: str) -> int:
    """Return how many words a sentence has."""
    return sum(any(map(str.isalnum, word)) for word in sentence.split())


def count(found: list[str]) -> Count:
    """Return what is counted of sentences."""
    lengths = [words(sentence) for sentence in found]
    return Count(len(lengths), sum(lengths), sum(length > LONG_WORDS for length in lengths))


def row(name: str, counted: Count) -> str:
    """Return one line of the table."""
    return f"{counted.sentences:9}  {counted.mean:5.1f}  {counted.long_share:7.1%}  {name}"


def main(arguments: list[str]) -> int:
    """Print the counts of the named files, or of PAGES, and return the exit status."""
    named = arguments or [str(path.relative_to(ROOT)) for page in PAGES for path in sorted(ROOT.glob(page))]
    pages = {name: sentences((ROOT / name).read_text(encoding="utf-8")) for name in named}
    print(f"{'sentences':>9}  {'mean':>5}  {f'over {LONG_WORDS}':>7}")
    for name, found in pages.items():
        print(row(name, count(found)))
    print(row("total", count([sentence for found in pages.values() for sentence in found])))
    failed = [name for name, found in pages.items() if not count(found).passes]
    for name in failed:
        print(
            f"\n{name}: expected a mean of at most {MEAN_WORDS:g} words, and at most {LONG_SHARE:.0%} over {LONG_WORDS}. Longest:"
        )
        for sentence in sorted(pages[name], key=words, reverse=True)[:WORST_SHOWN]:
            print(f"  {words(sentence)}: {sentence}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
