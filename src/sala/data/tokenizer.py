"""The embedded models' tokenizer: byte-level BPE, control words and symbols that a person can type."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sala.data.gguf_tokenizer import gguf_tokenizer
from sala.data.sources import Document
from sala.data.text import TextEncoder
from sala.errors import CheckpointError, InputError
from sala.model.checkpoint import is_gguf

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
# Surface forms as they are typed: `[set] @amber @birch @cedar @delta`. The space before a symbol belongs to it, so
# that a typed line has as many tokens as words and decodes to itself.
SET, GET, LET, COPY = "[set]", "[get]", "[let]", "[copy]"
CONTROLS = (SET, GET, LET, COPY)
SYMBOL_WORDS = """
    acorn agate alder algae alpine amber apple apricot arrow aspen atlas autumn badger bamboo banjo basil beacon beetle
    birch bison blossom bonfire boulder bramble breeze bronze brook butter cactus camel candle canyon cedar chalk cherry
    cliff clover cobalt comet copper coral cotton crane crater cricket crystal cypress dahlia daisy delta desert dune
    eagle ebony ember falcon fern finch fjord flint forest fossil garnet geyser ginger glacier granite grove harbor
    hazel heron honey indigo iris island ivory jade jasmine juniper kestrel lagoon lantern lark laurel lemon lichen
    lilac linen lotus magnet maple marble meadow mint mirror nectar nickel oak oasis olive onyx opal orchid otter owl
    pebble pepper petal pine plum poppy prairie quartz quill raven reed river saffron sage sparrow thistle thunder
    tulip violet walnut willow zephyr zinc
""".split()  # noqa: SIM905 - a list literal would be 128 lines
SYMBOLS = tuple(f" @{word}" for word in SYMBOL_WORDS)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids of the words that the generated tasks are written in; `symbols` is int64 (128,)."""

    begin: int
    end: int
    pad: int
    set: int
    get: int
    let: int
    copy: int
    symbols: NDArray[np.int64]


def train_tokenizer(documents: Iterable[Document], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` pieces on `documents`, then add control words and symbols after it.

    All 256 bytes are pieces, so every text encodes, and decodes to itself. Encoding puts `<|begin|>` first unless
    `add_special_tokens=False`.
    """
    if vocab_size < 256:
        raise InputError(f"vocab_size {vocab_size} is too small: the 256 bytes alone need 256")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (BEGIN, END, PAD)])
    # not special: an answer must survive skip_special_tokens
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in (*CONTROLS, *SYMBOLS)])
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a checkpoint, a folder or a GGUF file; raise CheckpointError when it has none, or a damaged one."""
    folder = Path(folder)
    if is_gguf(folder):
        return gguf_tokenizer(folder)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json; a checkpoint folder holds its tokenizer")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # of many kinds, as transformers and its JSON have no one for it
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read ({type(error).__name__}: {error}); expected whole tokenizer.json "
            "and tokenizer_config.json"
        ) from error


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Return the ids of the task words; raise InputError for a tokenizer without them."""
    ids = tokenizer.get_vocab()
    words = (BEGIN, END, PAD, SET, GET, LET, COPY, *SYMBOLS)
    missing = [word for word in words if word not in ids]
    if missing:
        raise InputError(
            f"the tokenizer lacks {len(missing)} task words, the first is {missing[0]!r}; generated tasks need a "
            "tokenizer made by sala.data.train_tokenizer"
        )
    return Vocabulary(
        begin=ids[BEGIN],
        end=ids[END],
        pad=ids[PAD],
        set=ids[SET],
        get=ids[GET],
        let=ids[LET],
        copy=ids[COPY],
        symbols=np.array([ids[word] for word in SYMBOLS], dtype=np.int64),
    )


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> NDArray[np.int64]:
    """Return all documents as one int64 stream (tokens,), each followed by `<|end|>`; encoded as one batch."""
    return encode_stream(tokenizer, documents, [tokenizer.get_vocab()[END]])


def encode_stream(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], end: Sequence[int]
) -> NDArray[np.int64]:
    """Return all documents as one int64 stream (tokens,), each followed by `end`; special tokens spelled out are text."""
    encoded = TextEncoder(tokenizer).encode_batch([document.text for document in documents])
    return np.concatenate([np.asarray([*row.ids, *end], dtype=np.int64) for row in encoded])
