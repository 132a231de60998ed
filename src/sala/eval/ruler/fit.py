"""How much haystack makes a prompt of an exact length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sala.eval.task import Prompt, Setting, TooShortError

PROBED = 64
# corrections of an estimate, each checked by one encoding of the whole prompt
MOST_CHECKS = 12


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt that grows by units.

    build: number of units -> prompt. unit: the i-th unit with what joins it to the one before it.
    least, most: the fewest and most units there can be. additive: tokens of units add up whatever their number.
    """

    build: Callable[[int], Prompt]
    unit: Callable[[int], str]
    least: int
    most: int | None = None
    additive: bool = True


def fit(draft: Draft, setting: Setting, length: int) -> Prompt:
    """Return the longest prompt that leaves room for the answer within `length` tokens.

    The number of units is estimated from a few of them and the whole prompt is encoded once. Units are then added or
    taken away by their own tokens; where these do not add up, the prompt is encoded again.

    Raises:
        TooShortError: the shortest prompt is too long.
    """
    shortest = draft.build(draft.least)
    fixed, room = setting.count(shortest), length - shortest.max_new_tokens
    if fixed > room:
        raise TooShortError(
            f"the shortest prompt has {fixed} tokens and its answer {shortest.max_new_tokens}; expected a length of "
            f"at least {fixed + shortest.max_new_tokens}, not {length}"
        )
    most = draft.most if draft.most is not None else length
    probed = _sizes(draft, setting, draft.least, min(PROBED, most - draft.least))
    mean = max(1.0, sum(probed) / max(1, len(probed)))
    number = min(most, draft.least + int((room - fixed) / mean))
    best, best_number = shortest, draft.least
    for _ in range(MOST_CHECKS):
        prompt = draft.build(number)
        spare = room - setting.count(prompt)
        if spare >= 0 and number >= best_number:
            best, best_number = prompt, number
        moved = _corrected(draft, setting, number, spare, most)
        if moved == number:
            break
        if draft.additive:
            return draft.build(moved)
        if moved <= best_number and spare < 0:
            moved = (best_number + number) // 2
            if moved == best_number:
                break
        number = moved
    return best


def first_that_fits(drafts: Sequence[Draft], setting: Setting, length: int) -> Prompt:
    """Return the prompt of the first of several definitions, the intended one first, whose shortest prompt is not too long.

    Raises:
        TooShortError: of the last one.
    """
    for draft in drafts[:-1]:
        try:
            return fit(draft, setting, length)
        except TooShortError:
            continue
    return fit(drafts[-1], setting, length)


def _corrected(draft: Draft, setting: Setting, number: int, spare: int, most: int) -> int:
    """Return the number of units that fills the room exactly, from a number that leaves `spare` tokens of it."""
    while spare < 0 and number > draft.least:
        sizes = _sizes(draft, setting, max(draft.least, number - PROBED), min(PROBED, number - draft.least))
        while sizes and spare < 0:
            spare += sizes.pop()
            number -= 1
    while number < most:
        sizes = _sizes(draft, setting, number, min(PROBED, most - number))
        for size in sizes:
            if size > spare:
                return number
            spare -= size
            number += 1
    return number


def _sizes(draft: Draft, setting: Setting, start: int, count: int) -> list[int]:
    """Return the tokens that each unit adds behind another one."""
    before = draft.unit(0)
    [alone, *together] = setting.sizes([before, *(before + draft.unit(i) for i in range(start, start + count))])
    return [size - alone for size in together]
