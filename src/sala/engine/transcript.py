"""From token ids to text while they come: whole characters only, cut exactly before a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# what a decoder writes for bytes that are not a character (yet)
INCOMPLETE = "\ufffd"


class Transcript:
    """The text of an answer as it grows.

    A piece is given out once later tokens cannot change it: not while its last character lacks bytes, and not while it
    could be the start of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False
        self.text = ""  # given out
        self._ids: list[int] = []
        # ids before `_context` are done with; those up to `_read` are decoded again beside new ones, because some
        # tokenizers write the first token of a text otherwise than the same one after others
        self._context, self._read = 0, 0
        self._held = ""  # decoded, perhaps the start of a stop string

    def add(self, token: int) -> str:
        """Take one more token and return the text that is certain now."""
        self._ids.append(token)
        return self._give(self._decode(whole=True))

    def finish(self) -> str:
        """Return what was held back; the answer is complete."""
        piece = self._give(self._decode(whole=False))
        if self.stopped:
            return piece
        rest, self._held = self._held, ""
        self.text += rest
        return piece + rest

    def _decode(self, whole: bool) -> str:
        before = self._to_text(self._ids[self._context : self._read])
        after = self._to_text(self._ids[self._context :])
        if len(after) <= len(before) or (whole and after.endswith(INCOMPLETE)):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def _to_text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _give(self, piece: str) -> str:
        if self.stopped:
            return ""
        held = self._held + piece
        ends = [at for stop in self.stop if (at := held.find(stop)) >= 0]
        if ends:
            certain, self._held, self.stopped = held[: min(ends)], "", True
        else:
            size = max((overlap(held, stop) for stop in self.stop), default=0)
            certain, self._held = held[: len(held) - size], held[len(held) - size :]
        self.text += certain
        return certain


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
