"""Lengths as people write them: 512, 16K, 1M, in binary thousands."""

from sala.errors import InputError, shortened

LONGEST = 2**40
UNITS = {"": 1, "K": 2**10, "M": 2**20}


def parse_length(text: str) -> int:
    """Return the number of tokens of `512`, `16K` or `1M`.

    Raises:
        InputError: it is none of these, not above zero, or more than `LONGEST`.
    """
    digits, unit = text.strip().upper(), ""
    if digits and digits[-1] in UNITS:
        digits, unit = digits[:-1], digits[-1]
    # Python itself does not read numbers of thousands of digits
    length = int(digits) * UNITS[unit] if digits.isdecimal() and len(digits) <= len(str(LONGEST)) else 0
    if not 1 <= length <= LONGEST:
        raise InputError(
            f"length {shortened(text)!r}; expected a number of tokens such as 512, 16K or 1M, at most {LONGEST:,}"
        )
    return length


def length_label(length: float) -> str:
    """Return 512, 1K, 64K, 1M."""
    if length < UNITS["K"]:
        return f"{length:g}"
    return f"{length / UNITS['K']:g}K" if length < UNITS["M"] else f"{length / UNITS['M']:g}M"
