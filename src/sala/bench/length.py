"""Lengths as people write them: 512, 16K, 1M, in binary thousands."""

from sala.errors import InputError

UNITS = {"": 1, "K": 2**10, "M": 2**20}


def parse_length(text: str) -> int:
    """Return the number of tokens of `512`, `16K` or `1M`.

    Raises:
        InputError: it is none of these, or not above zero.
    """
    digits, unit = text.strip().upper(), ""
    if digits and digits[-1] in UNITS:
        digits, unit = digits[:-1], digits[-1]
    if not digits.isdecimal() or int(digits) < 1:
        raise InputError(f"length {text!r}; right would be a number of tokens such as 512, 16K or 1M")
    return int(digits) * UNITS[unit]


def length_label(length: float) -> str:
    """Return 512, 1K, 64K, 1M."""
    if length < UNITS["K"]:
        return f"{length:g}"
    return f"{length / UNITS['K']:g}K" if length < UNITS["M"] else f"{length / UNITS['M']:g}M"
