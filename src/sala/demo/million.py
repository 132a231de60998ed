"""One needle in a document of a million tokens, once: was it found, how long did it take, what memory.

`python -m sala.demo.million --model FOLDER [--length N] [--depth D] [--out FILE]`
"""

import argparse
import logging
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sala.bench import environment, peak_memory
from sala.data import load_tokenizer
from sala.demo.measure import HYBRID_FULL, HYBRID_SPARSE, read_ground, variants
from sala.demo.progress import Say
from sala.demo.story import describe, needle_line
from sala.demo.trials import write_json
from sala.eval import find_needle
from sala.model.checkpoint import find_checkpoint
from sala.model.families import load_model

logger = logging.getLogger("sala.demo.million")

LENGTH, DEPTH = 1_000_000, 0.35
REPORT_EVERY_S = 60.0


def find_in_million(
    model: str, out: Path, *, length: int = LENGTH, depth: float = DEPTH, say: Say = lambda line: None
) -> dict[str, Any]:
    """Read the library's test documents, one after the other, with one needle, and write what happened to `out`.

    The model is the hybrid `model` with block-sparse attention where it has kept layers.

    Raises:
        CheckpointError: no such hybrid. InputError: the documents are shorter than `length`.
    """
    tokenizer = load_tokenizer(find_checkpoint(model))
    ground = read_ground(tokenizer)
    hybrid = load_model(model, dtype=torch.float32)
    kinds = variants(hybrid)
    name = HYBRID_SPARSE if HYBRID_SPARSE in kinds else HYBRID_FULL
    started = said = perf_counter()

    def note(done: int, total: int) -> None:
        nonlocal said
        now = perf_counter()
        if now - said >= REPORT_EVERY_S or done == total:
            said = now
            say(f"{done:,} of {total:,} tokens, {now - started:.0f} s")

    with peak_memory() as memory:
        result = find_needle(kinds[name], ground.words, ground.text, length=length, depth=depth, on_chunk=note)
    written = {
        "model": name,
        "hybrid": describe(hybrid),
        "wanted_text": str(tokenizer.decode(list(result.wanted))).strip(),
        "answer_text": str(tokenizer.decode(list(result.answer))).strip(),
        "peak_bytes": memory.peak_bytes,
        "added_bytes": memory.added_bytes,
        "environment": environment(),
    } | asdict(result)
    say(needle_line(written))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, written)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder of a hybrid")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--depth", type=float, default=DEPTH)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/needle.json"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    find_in_million(arguments.model, arguments.out, length=arguments.length, depth=arguments.depth, say=logger.info)


if __name__ == "__main__":
    main()
