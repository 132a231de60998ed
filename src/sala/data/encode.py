"""From records to shards: a document at a time through the tokenizer, what could not be used counted by reason."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from sala.data.chat import ASSISTANT, ChatTemplate, TemplateRefusal, is_conversation, overlaps
from sala.data.files import NOT_UTF8, Record
from sala.data.shards import SHARD_TOKENS, shard_writer, tokenizer_hash
from sala.data.text import TextEncoder, around, read_as_text
from sala.errors import InputError

EMPTY = "empty"
REFUSED = "refused by the chat template"
NO_ANSWER = "without an answer of the assistant"
UNMARKED = "whose only answers the chat template writes in another way than when it asks for them"
BAD_TOOLS = "with tools that are no list of objects"

# documents are encoded together until they have so many characters; larger batches were not faster
BATCH_CHARACTERS = 2**20
# of each reason, for a person to look at
NUM_EXAMPLES = 3


@dataclass
class Summary:
    """What tokenising read and wrote; `str()` is for a person."""

    documents: int = 0
    tokens: int = 0
    targets: int = 0  # tokens with loss
    longest: int = 0  # tokens of the longest document
    spelled: int = 0  # special tokens spelled out in texts, read as text
    unmarked: int = 0  # answers without loss, as the template writes them in another way once more follows
    skipped: dict[str, int] = field(default_factory=dict)  # records by reason
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first few of each reason
    lengths: dict[int, int] = field(default_factory=dict)  # documents with fewer tokens than this power of two

    def skip(self, reason: str, example: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(example)

    def count(self, tokens: int, targets: int) -> None:
        self.documents += 1
        self.tokens += tokens
        self.targets += targets
        self.longest = max(self.longest, tokens)
        size = 1 << tokens.bit_length()
        self.lengths[size] = self.lengths.get(size, 0) + 1

    def __str__(self) -> str:
        lines = [f"{self.documents:,} documents, {self.tokens:,} tokens, the longest {self.longest:,}"]
        if self.targets < self.tokens:
            lines.append(f"{self.targets:,} tokens with loss ({self.targets / self.tokens:.1%})")
        if self.spelled:
            lines.append(read_as_text(self.spelled))
        if self.unmarked:
            answers = f"{self.unmarked:,} answer{'' if self.unmarked == 1 else 's'}"
            lines.append(f"{answers} without loss: the chat template writes an answer in another way once more follows")
        lines += [
            f"skipped {count:,} {reason}: {', '.join(self.examples[reason])}{', ...' if count > NUM_EXAMPLES else ''}"
            for reason, count in sorted(self.skipped.items())
        ]
        lines += [f"{self.lengths[size]:,} of fewer than {size:,} tokens" for size in sorted(self.lengths)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Text:
    """What a record holds, ready for the tokenizer; a text has no `answers`, all of it is learnt."""

    origin: str
    text: str
    answers: tuple[tuple[int, int], ...] | None = None
    spelled: int = 0
    unmarked: int = 0


def write_shards(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerFast,
    out: str | Path,
    *,
    column: str = "text",
    chat: bool = False,
    parse_special: bool = False,
    source: Sequence[str] = (),
    shard_tokens: int = SHARD_TOKENS,
) -> Summary:
    """Tokenise `records` into the new folder `out`, which appears when everything is done; see `sala.data.shards`.

    A text gets the tokens that the tokenizer puts around one (`<|begin|>`) and always its end token. A conversation is
    the chat template's text and nothing else. Records that hold no document are skipped and counted. Memory: about a
    million characters, or one document.

    Args:
        column: the key of a record's text, or with `chat` of its messages, a list of `{"role", "content"}`.
        chat: write conversations through the chat template, with loss on the assistant's tokens alone.
        parse_special: read special tokens that texts spell out as special tokens; as text otherwise.
        source: where the records come from, for the header.

    Raises:
        InputError: `out` exists already, no record holds a document, or the chat template is not fit (`ChatTemplate`).
    """
    summary = Summary()
    template = ChatTemplate(tokenizer, parse_special) if chat else None
    encoder = template.encoder if template else TextEncoder(tokenizer, parse_special)
    begin, end = ([], []) if chat else surroundings(tokenizer)
    with shard_writer(out, with_loss=chat, shard_tokens=shard_tokens) as writer:
        for batch in _batches(_texts(records, column, template or encoder, summary)):
            encoded = encoder.encode_batch([document.text for document in batch], offsets=chat)
            for document, encoding in zip(batch, encoded, strict=True):
                ids = np.array([*begin, *encoding.ids, *end], np.int64)
                loss = None if document.answers is None else np.array(overlaps(encoding.offsets, document.answers))
                if not encoding.ids:
                    summary.skip(EMPTY, document.origin)
                    continue
                writer.add(ids, loss)
                summary.count(len(ids), len(ids) if loss is None else int(loss.sum()))
                summary.spelled += document.spelled
                summary.unmarked += document.unmarked
        if not summary.documents:
            reasons = str(summary).splitlines()[1:]
            raise InputError(
                f"no document with {column!r} in {', '.join(source) or 'the records'}; "
                f"{'; '.join(reasons) or 'there is no record'}"
            )
        writer.finish(
            {
                "tokenizer": {"sha256": tokenizer_hash(tokenizer), "size": len(tokenizer)},
                "begin": begin,
                "end": end,
                "pad": next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
                "chat": chat,
                "parse_special": parse_special,
                "source": list(source),
                "summary": dataclasses.asdict(summary),
            }
        )
    return summary


def surroundings(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return the ids that stand before and after the text of every document.

    Before: what the tokenizer is configured to put first, as in front of a prompt. After: what it puts last, and the
    end token in any case, because a model has to learn where texts end.
    """
    begin, end = around(tokenizer)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in end:
        end = [*end, tokenizer.eos_token_id]
    return begin, end


def _texts(
    records: Iterable[Record],
    column: str,
    reader: ChatTemplate | TextEncoder,
    summary: Summary,
) -> Iterator[_Text]:
    for record in records:
        if record.row is None:
            summary.skip(str(record.problem), record.origin)
            continue
        value: Any = record.row.get(column)
        try:
            if isinstance(reader, ChatTemplate):
                yield _conversation(record.origin, value, record.row.get("tools"), column, reader)
            else:
                yield _text(record.origin, value, column, reader)
        except _Unusable as unusable:
            summary.skip(unusable.reason, record.origin + unusable.detail)


class _Unusable(Exception):
    """A record holds no document; `detail` is what this record has beyond the reason."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def _text(origin: str, value: Any, column: str, encoder: TextEncoder) -> _Text:
    if not isinstance(value, str):
        raise _Unusable(f"without text in {column!r}")
    if not value.strip():
        raise _Unusable(EMPTY)
    if not _is_unicode(value):
        raise _Unusable(NOT_UTF8)
    return _Text(origin, value, spelled=encoder.count(value))


def _conversation(origin: str, value: Any, tools: Any, column: str, template: ChatTemplate) -> _Text:
    if not is_conversation(value):
        raise _Unusable(f"without messages in {column!r}")
    if not any(message["role"] == ASSISTANT for message in value):
        raise _Unusable(NO_ANSWER)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise _Unusable(BAD_TOOLS)
    try:
        chat = template.render(value, tools)
    except TemplateRefusal as refusal:
        raise _Unusable(REFUSED, f" ({refusal})") from refusal
    if not any(end > start for start, end in chat.answers):
        raise _Unusable(UNMARKED if chat.unmarked else NO_ANSWER)
    if not _is_unicode(chat.text):
        raise _Unusable(NOT_UTF8)
    return _Text(origin, chat.text, chat.answers, chat.spelled, chat.unmarked)


def _is_unicode(text: str) -> bool:
    """Whether `text` is whole characters: JSON can write half of one, `"\\ud83d"`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _batches(texts: Iterable[_Text]) -> Iterator[list[_Text]]:
    batch: list[_Text] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
