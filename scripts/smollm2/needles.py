"""Sentences to be found again in prose of 1.5K to 7.5K tokens, as JSON lines: plain documents, and conversations that ask.

    python scripts/smollm2/needles.py --tokenizer smollm2-135m-instruct --text text/prose.jsonl --out text

It writes `needles_text.jsonl`, where the sentences follow once more at the end of the document, and `needles_chat.jsonl`, where a user
asks for them one after the other. The document is always shorter than its length in tokens.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sala.data import load_tokenizer


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LENGTHS = (1536, 2048, 3072, 4096, 6144, 7400)
# tokens that are left for needles and questions
ROOM = 240
COUNTS = (1, 2, 4, 6)

NAMES = words("""Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Lukas Maria Nils Olga Paul Rosa Simon Tara Victor
Wanda Yusuf Zoe Amir Bella Carlos Diana Emil Fiona George Hana Ivan Julia Kofi Laura Marco Nadia Oscar Petra Quinn
Rania Samuel Tomas Ursula""")
THINGS = words("""umbrella lantern compass violin telescope ledger basket hammer kettle mirror blanket candle ladder saddle trumpet
anchor barrel carpet drum engine feather globe helmet jacket key lamp map necklace oar parcel quilt rope sword teapot
urn vase wagon""")
PLACES = """the old mill; the harbor; the library; the north tower; the kitchen garden; the railway station; the blue house; the market
square; the chapel; the boathouse; the observatory; the stone bridge; the orchard; the attic; the lighthouse; the bakery"""
WORDS = words("""amber birch coral delta ember falcon granite harbor indigo jasper kestrel lagoon meadow nectar opal prairie quartz
raven sienna thistle umber violet willow yarrow zephyr""")


@dataclass(frozen=True)
class Needle:
    """A sentence, and the question that it answers."""

    key: str
    sentence: str
    question: str


def number(rng: random.Random) -> Needle:
    key = f"{rng.choice(WORDS)} {rng.choice(WORDS)}"
    return Needle(key, f"The number of {key} is {rng.randrange(1000, 99999)}.", f"What is the number of {key}?")


def place(rng: random.Random) -> Needle:
    key = f"{rng.choice(NAMES)}'s {rng.choice(THINGS)}"
    where = " ".join(rng.choice(PLACES.split(";")).split())
    return Needle(key, f"{key} was left at {where}.", f"Where was {key} left?")


def password(rng: random.Random) -> Needle:
    key, word = f"{rng.choice(WORDS)} gate", f"{rng.choice(WORDS)}-{rng.choice(WORDS)}-{rng.randrange(10, 99)}"
    return Needle(key, f"The password of the {key} is {word}.", f"What is the password of the {key}?")


def purchase(rng: random.Random) -> Needle:
    key = f"{rng.choice(NAMES)} {rng.choice(WORDS).title()}"
    return Needle(key, f"{key} bought a {rng.choice(THINGS)} that day.", f"What did {key} buy?")


KINDS: tuple[Callable[[random.Random], Needle], ...] = (number, place, password, purchase)


def hidden(rng: random.Random, haystack: str) -> tuple[str, list[Needle]]:
    """Return a text with needles of different keys between its sentences, and the needles in another order."""
    needles: dict[str, Needle] = {}
    count = rng.choice(COUNTS)
    while len(needles) < count:
        needle = rng.choice(KINDS)(rng)
        needles.setdefault(needle.key, needle)
    sentences = haystack.split(". ")
    for needle in needles.values():
        sentences.insert(rng.randrange(len(sentences) + 1), needle.sentence.rstrip("."))
    order = list(needles.values())
    rng.shuffle(order)
    return ". ".join(sentences), order


def haystack(rng: random.Random, texts: list[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Return a piece of at most that many tokens of one of the texts that are long enough."""
    longest = 8 * tokens  # characters: more than any tokenizer's tokens have on average
    text = rng.choice([text for text in texts if len(text) > longest])
    start = rng.randrange(len(text) - longest)
    return tokenizer.decode(tokenizer(text[start : start + longest], add_special_tokens=False)["input_ids"][:tokens])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=420)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    rng, tokenizer = random.Random(options.seed), load_tokenizer(options.tokenizer)
    texts = [json.loads(line)["text"] for line in options.text.read_text(encoding="utf-8").splitlines()]
    rows: dict[str, list[dict[str, object]]] = {"text": [], "chat": []}
    for index in range(options.documents):
        body, needles = hidden(rng, haystack(rng, texts, tokenizer, rng.choice(LENGTHS) - ROOM))
        if index % 2:
            turns = []
            for needle in needles:
                asked = needle.question if turns else f"{body}\n\n{needle.question}"
                turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": needle.sentence}]
            rows["chat"].append({"messages": turns})
        else:
            rows["text"].append({"text": f"{body}\n\n{' '.join(needle.sentence for needle in needles)}"})
    for kind, lines in rows.items():
        path = options.out / f"needles_{kind}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
