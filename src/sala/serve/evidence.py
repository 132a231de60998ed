"""Which passages of a prompt the sparse layers chose to read for an answer, by the attention they got."""

from collections.abc import Mapping
from typing import Any

from sala.serve.prompts import Prompts
from sala.serve.replies import Choice

MOST_PASSAGES = 8
# of the block that got most: what got less is chance
SHARE = 0.2


def passages(prompts: Prompts, choice: Choice, documents: Mapping[str, str], block_size: int) -> list[dict[str, Any]]:
    """Return passages with the document they are in, their characters [start, end) there, text and share of
    the attention to what was chosen.

    Without documents positions count in the whole prompt. Empty where the layers read everything.
    """
    done, prompt = choice.done, choice.prompt
    assert done is not None
    total = sum(done.blocks)
    if not total or not prompt.text:
        return []
    offsets = prompts.offsets(prompt)
    if offsets is None:
        return []
    spans = _spans(done.blocks, block_size, len(offsets))
    found = []
    for first, last, weight in spans[:MOST_PASSAGES]:
        start, end = offsets[first][0], offsets[last - 1][1]
        found.append({**_place(start, end, prompt.text, documents), "share": round(weight / total, 4)})
    return found


def _spans(blocks: tuple[float, ...], block_size: int, length: int) -> list[tuple[int, int, float]]:
    """Return neighbouring blocks that got much as spans of tokens with their weights, the heaviest first."""
    least = SHARE * max(blocks)
    spans: list[tuple[int, int, float]] = []
    for index, weight in enumerate(blocks):
        start, end = index * block_size, min((index + 1) * block_size, length)
        if not weight or weight < least or start >= length:
            continue
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end, spans[-1][2] + weight)
        else:
            spans.append((start, end, weight))
    return sorted(spans, key=lambda span: -span[2])


def _place(start: int, end: int, text: str, documents: Mapping[str, str]) -> dict[str, Any]:
    at = 0
    for name, document in documents.items():
        # as `join` puts them in: in this order, without the last empty lines
        body = document.rstrip("\n")
        begin = text.find(body, at)
        if begin < 0:
            continue
        at = begin + len(body)
        if begin <= start < at:
            inside, until = start - begin, min(end, at) - begin
            return {"document": name, "start": inside, "end": until, "text": body[inside:until]}
    return {"document": None, "start": start, "end": end, "text": text[start:end]}
