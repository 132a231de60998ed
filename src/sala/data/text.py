"""Text as tokens: a special token that is spelled out in a text is ordinary text, and counted."""

import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from sala.errors import CheckpointError

# no text has these characters by chance: Unicode leaves them to private agreements
_PRIVATE = range(0xF0000, 0xFFFFE)


class TextEncoder:
    """Encodes texts so that only the special tokens of a chat template, or of nobody, are special.

    Special tokens get secret names, drawn anew by every process, in a copy of the tokenizer. What a text spells out is
    then as ordinary as the rest of it. A chat template writes special tokens by their spelling, so `hide` gives those of
    the contents their names before a template is rendered, and `swap` exchanges names and spellings afterwards. A name is
    as long as its token: positions in a text stay what they are.

    The tokenizer's other added tokens (`[set]` and `@amber` of the embedded models, Qwen's `<think>`) are words, and stay.

    parse_special: read special tokens that are spelled out as special tokens; nothing has a name then.
    also: added tokens to treat as special ones, such as those that a chat template ends turns with.

    Raises:
        CheckpointError: the tokenizer is not one of the `tokenizers` library.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, parse_special: bool = False, also: Collection[str] = ()):
        # typed as the base class, which has no name for what all but a few of its kinds have
        self.tokenizer: Any = tokenizer
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise CheckpointError(
                f"the tokenizer is a {type(tokenizer).__name__} without tokenizer.json; expected a fast tokenizer"
            )
        special = {*tokenizer.all_special_tokens, *also}
        tokens = [t.content for t in added_tokens(tokenizer) if t.special or t.content in special]
        self._names = {} if parse_special else _name(tokens)
        self._spelled = _any_of(self._names)
        self._named = _any_of(self._names.values())
        self._exchange = self._names | {name: token for token, name in self._names.items()}
        self._either = _any_of(self._exchange)

    def count(self, text: str) -> int:
        """Return how many special tokens `text` spells out."""
        return sum(1 for _ in self._spelled.finditer(text))

    def hide(self, value: Any) -> tuple[Any, int]:
        """Return strings, however nested, with names for the special tokens they spell out, and how many those were."""
        if isinstance(value, str):
            return self._spelled.subn(lambda found: self._names[found[0]], value)
        if isinstance(value, Mapping):
            keys, values = self.hide(list(value.keys())), self.hide(list(value.values()))
            return dict(zip(keys[0], values[0], strict=True)), keys[1] + values[1]
        if isinstance(value, (list, tuple)):
            hidden = [self.hide(item) for item in value]
            return [item for item, _ in hidden], sum(count for _, count in hidden)
        return value, 0

    def swap(self, text: str) -> str:
        """Return `text` with names where it spells special tokens out, and these spelled out where it has their names."""
        return self._either.sub(lambda found: self._exchange[found[0]], text)

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without the tokens that the tokenizer puts around it."""
        # the same ids in most texts, without the second that renaming takes for a large vocabulary
        ids: list[int] = self.tokenizer(self.swap(text), add_special_tokens=False, verbose=False)["input_ids"]
        special = {self.tokenizer.convert_tokens_to_ids(token) for token in self._names} - {self.tokenizer.unk_token_id}
        written = sum(self._exchange[found] != self.tokenizer.unk_token for found in self._named.findall(text))
        # not by what the text spells out alone: some tokenizers normalise another spelling to it, or merge letters to it
        if self._spelled.search(text) or sum(i in special for i in ids) != written:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return ids

    def encode_batch(self, texts: Sequence[str], offsets: bool = False) -> list[Encoding]:
        """Return the encodings of texts, without the tokens that the tokenizer puts around them.

        offsets: with the characters [start, end) of each token, which take in its spaces.
        """
        encode = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
        return list(encode(list(texts), add_special_tokens=False))

    @cached_property
    def _backend(self) -> Tokenizer:
        """A copy that neither pads nor truncates, with special tokens by their names."""
        description = json.loads(self.tokenizer.backend_tokenizer.to_str())
        _rename(description, self._names)
        # it trims offsets, so that a token of spaces alone would belong to nobody; special tokens are put on by hand
        description.update(post_processor=None, padding=None, truncation=None)
        backend = Tokenizer.from_str(json.dumps(description))
        ids = self.tokenizer.backend_tokenizer.token_to_id
        moved = [token for token, name in self._names.items() if backend.token_to_id(name) != ids(token)]
        if moved:
            raise CheckpointError(f"tokenizer.json has {moved[0]!r} in its vocabulary and again as another added token")
        return backend


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[AddedToken]:
    """Return the tokens that `tokenizer` finds before it looks at words, by id; not those that must stand alone.

    A token with `single_word` is found between spaces only, where a name in its place would not always be.
    """
    return [t for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.content and not t.single_word]


def around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer is configured to put before and after a text, as in a prompt."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    outer = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(outer)) if outer[i : i + len(inner)] == inner), None)
    assert at is not None, f"special tokens changed the text: {inner} became {outer}"
    begin, end = outer[:at], outer[at + len(inner) :]
    if getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id not in begin:
        # asked for in tokenizer_config.json but left out by tokenizer.json: without it a model's numbers are others
        begin = [tokenizer.bos_token_id, *begin]
    return begin, end


def read_as_text(count: int) -> str:
    """Return what to tell a person about special tokens that a text spells out."""
    tokens = "1 special token" if count == 1 else f"{count:,} special tokens"
    return f"{tokens} spelled out in the text {'was' if count == 1 else 'were'} read as text"


def _name(tokens: Sequence[str]) -> dict[str, str]:
    """Return a name for each token, as long as the token."""
    names: dict[str, str] = {}
    for token in tokens:
        name = None
        while name is None or name in names.values():
            name = "".join(chr(secrets.choice(_PRIVATE)) for _ in token)
        names[token] = name
    return names


def _any_of(words: Collection[str]) -> re.Pattern[str]:
    """Return a pattern for the longest of `words` at a place, as `tokenizers` looks for added tokens; for none, nothing."""
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or r"(?!)")


def _rename(description: dict[str, Any], names: Mapping[str, str]) -> None:
    """Change the names of tokens in a tokenizer.json: no text is encoded as one of them then, by no way of its model."""
    for token in description["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], normalized=False)
    model = description["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [
            pair for pair in pairs if names.keys().isdisjoint((*pair, pair[0] + pair[1].removeprefix(prefix)))
        ]
