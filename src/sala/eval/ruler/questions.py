"""Questions about documents: RULER's `qa_1` (SQuAD) and `qa_2` (HotpotQA), from the files of those data sets."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sala.errors import InputError
from sala.eval.ruler.fit import Draft, fit
from sala.eval.ruler.niah import with_prefix
from sala.eval.task import Prompt, Setting

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
TEMPLATE = (
    INSTRUCTION + "\n\nThe following are given documents.\n\n{context}\n\n" + INSTRUCTION + "\n\nQuestion: {question}"
)
PREFIX = " Answer:"
NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Asked:
    """One question; `gold` and `near` are indices of documents: those with the answer, and others of the same article."""

    question: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Library:
    documents: tuple[str, ...]
    questions: tuple[Asked, ...]


def read_squad(path: Path) -> Library:
    """Read SQuAD 2.0's development file; questions without an answer are left out."""

    def parse(data: Any) -> Library:
        articles = [article["paragraphs"] for article in data["data"]]
        documents = sorted({paragraph["context"] for article in articles for paragraph in article})
        at = {text: i for i, text in enumerate(documents)}
        questions = []
        for article in articles:
            around = [at[paragraph["context"]] for paragraph in article]
            for paragraph in article:
                own = at[paragraph["context"]]
                near = tuple(i for i in dict.fromkeys(around) if i != own)
                for asked in paragraph["qas"]:
                    if not asked.get("is_impossible", False):
                        answers = tuple(answer["text"] for answer in asked["answers"])
                        questions.append(Asked(asked["question"], answers, (own,), near))
        return Library(tuple(documents), tuple(questions))

    return _parsed(path, parse, "SQuAD")


def read_hotpot(path: Path) -> Library:
    """Read HotpotQA's development file with distractors."""

    def parse(data: Any) -> Library:
        texts = [[f"{title}\n{''.join(lines)}" for title, lines in row["context"]] for row in data]
        documents = sorted({text for row in texts for text in row})
        at = {text: i for i, text in enumerate(documents)}
        questions = [
            Asked(row["question"], (row["answer"],), tuple(at[text] for text in own))
            for row, own in zip(data, texts, strict=True)
        ]
        return Library(tuple(documents), tuple(questions))

    return _parsed(path, parse, "HotpotQA")


READERS = {"squad": read_squad, "hotpotqa": read_hotpot}


def make_question(source: str, setting: Setting, length: int, index: int) -> Prompt:
    library: Library = setting.keep(source, lambda: READERS[source](setting.file(source)))
    if index >= len(library.questions):
        raise InputError(
            f"{source} has {len(library.questions):,} questions; expected fewer samples than {index + 1:,}"
        )
    asked = library.questions[index]
    rng = setting.rng(source, length, index)
    known = {*asked.gold, *asked.near}
    near = rng.sample(asked.near, len(asked.near))
    far = rng.sample([i for i in range(len(library.documents)) if i not in known], len(library.documents) - len(known))
    chosen = [*asked.gold, *near, *far]
    order_seed = rng.random()

    def build(number: int) -> Prompt:
        order = chosen[:number]
        random.Random(order_seed).shuffle(order)
        written = (f"Document {place}:\n{library.documents[i]}" for place, i in enumerate(order, 1))
        text = TEMPLATE.replace("{question}", asked.question).replace("{context}", "\n\n".join(written))
        places = [round(order.index(i) / number, 4) for i in asked.gold]
        facts = {"depths": places, "label": "ruler", "haystack": source}
        return with_prefix(text, PREFIX, asked.answers, NEW_TOKENS, (), facts, setting)

    def unit(i: int) -> str:
        return f"\n\nDocument {i + 1}:\n{library.documents[chosen[i]]}"

    return fit(Draft(build, unit, len(asked.gold), len(chosen), additive=False), setting, length)


def _parsed(path: Path, parse: Any, name: str) -> Library:
    try:
        return parse(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(path)!r} is no {name} file ({error!r}); expected its development set in JSON"
        ) from error
