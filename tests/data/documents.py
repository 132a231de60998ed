"""Shards whose tokens say where they come from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sala.data import Shards
from sala.data.shards import shard_writer

# tokens of a document that can be told apart
ROOM = 10_000
PAD = 4_000_000_000


def tokens_of(document: int, length: int) -> NDArray[np.int64]:
    return document * ROOM + np.arange(length)


def make_shards(
    folder: Path, lengths: Sequence[int], shard_tokens: int = 100, with_loss: bool = False, sha256: str = "test"
) -> Shards:
    """Write documents of these lengths; with a loss mask, even tokens are targets."""
    with shard_writer(folder, with_loss=with_loss, shard_tokens=shard_tokens) as writer:
        for document, length in enumerate(lengths):
            ids = tokens_of(document, length)
            writer.add(ids, ids % 2 == 0 if with_loss else None)
        writer.finish({"tokenizer": {"sha256": sha256, "size": 1}, "pad": PAD})
    return Shards(folder)
