"""Windows of text: what layers are fitted to, and what the result is measured on."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sala.data import Document, encode_stream, library_documents
from sala.data.files import find_files, read_files
from sala.errors import InputError

# of the text, and of the windows
UNSEEN = 0.1
FIELD = "text"


def windows(
    tokenizer: PreTrainedTokenizerBase, sources: Sequence[str] | None, count: int, length: int
) -> tuple[Tensor, Tensor]:
    """Return int64 windows of `length` tokens, evenly spread: `count` to fit to, and at least 4 of other text to measure on.

    sources: files and folders, whose last tenth measures; None: the running Python's library, by its own splits.

    Raises:
        InputError: a source cannot be read, has no text, or less than a window.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if sources is None:
        # of each split as much as is needed, about
        some = [library_documents(split)[: max(8, count)] for split in ("train", "test")]
        seen, unseen = (encode_stream(tokenizer, documents, end) for documents in some)
    else:
        tokens = encode_stream(tokenizer, _documents(sources), end)
        border = int(len(tokens) * (1 - UNSEEN))
        seen, unseen = tokens[:border], tokens[border:]
    return _cut(seen, count, length), _cut(unseen, max(4, int(count * UNSEEN)), length)


def _documents(sources: Sequence[str]) -> list[Document]:
    documents = []
    for record in read_files(find_files(sources).paths, FIELD):
        text = None if record.row is None else record.row.get(FIELD)
        if not isinstance(text, str):
            raise InputError(f"{record.origin} has no {FIELD!r}: {record.problem or 'another column'}; expected text")
        documents.append(Document(record.origin, text))
    if not documents:
        raise InputError(f"{', '.join(sources)} holds no text; expected some")
    return documents


def _cut(tokens: NDArray[np.int64], count: int, length: int) -> Tensor:
    if len(tokens) < length:
        raise InputError(f"the text has {len(tokens):,} tokens; expected at least {length:,}, or a smaller --length")
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]))
