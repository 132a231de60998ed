"""Needles in a document of a million tokens, read once: which were found, how long did it take, what memory.

`python -m sala.demo.million --model FOLDER [--length N] [--needles N] [--out FILE]`
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sala.bench import environment, peak_memory
from sala.data import load_tokenizer
from sala.demo.measure import HYBRID_FULL, HYBRID_SPARSE, read_ground, variants
from sala.demo.progress import Say
from sala.demo.story import describe
from sala.demo.trials import write_json
from sala.engine.memory import human_bytes
from sala.errors import require_writable
from sala.eval import find_needles
from sala.model.checkpoint import find_checkpoint
from sala.model.families import load_model

logger = logging.getLogger("sala.demo.million")

LENGTH, NEEDLES = 1_000_000, 16
REPORT_EVERY_S = 60.0


def find_in_million(
    model: str, out: Path, *, length: int = LENGTH, needles: int = NEEDLES, say: Say = lambda line: None
) -> dict[str, Any]:
    """Read the library's test documents, one after the other, with needles in them, and write what happened to `out`.

    The model is the hybrid `model` with block-sparse attention where it has kept layers.

    Raises:
        CheckpointError: no such hybrid. InputError: the needles do not fit into `length`.
    """
    tokenizer = load_tokenizer(find_checkpoint(model))
    ground = read_ground(tokenizer)
    hybrid = load_model(model, dtype=torch.float32)
    kinds = variants(hybrid)
    name = HYBRID_SPARSE if HYBRID_SPARSE in kinds else HYBRID_FULL
    started = said = perf_counter()
    done = 0

    def note(tokens: int) -> None:
        nonlocal said, done
        done += tokens
        now = perf_counter()
        if now - said >= REPORT_EVERY_S or done == length:
            said = now
            say(f"{done:,} of {length:,} tokens, {now - started:.0f} s")

    with peak_memory() as memory:
        result = find_needles(kinds[name], tokenizer, ground.text, length=length, num_needles=needles, on_tokens=note)

    def words(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens))).strip()

    written = asdict(result) | {
        "model": name,
        "hybrid": describe(hybrid),
        "found": result.found,
        "answers": [
            {
                "depth": answer.depth,
                "wanted": words(answer.wanted),
                "answer": words(answer.answer),
                "correct": answer.correct,
            }
            for answer in result.answers
        ],
        "text_tokens": len(ground.text),
        "peak_bytes": memory.peak_bytes,
        "added_bytes": memory.added_bytes,
        "environment": environment(),
    }
    say(
        f"{result.found} of {needles} needles found in {length:,} tokens of source code; read in {result.read_s:,.0f} s, "
        f"{result.read_tokens_per_s:,.0f} tokens/s, peak memory "
        + ("unknown here" if memory.peak_bytes is None else human_bytes(memory.peak_bytes))
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, written)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder of a hybrid")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--needles", type=int, default=NEEDLES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/needles-million.json"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    require_writable(arguments.out)
    find_in_million(arguments.model, arguments.out, length=arguments.length, needles=arguments.needles, say=logger.info)


if __name__ == "__main__":
    main()
