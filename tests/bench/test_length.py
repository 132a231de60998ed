"""Lengths as people write them."""

import pytest

from sala.bench import length_label, parse_length
from sala.errors import InputError


@pytest.mark.parametrize(("text", "length"), [("512", 512), ("16K", 2**14), ("1m", 2**20), ("1536", 1536)])
def test_lengths_are_binary_thousands_and_read_back(text: str, length: int) -> None:
    assert parse_length(text) == length
    assert parse_length(length_label(length)) == length if length % 1024 == 0 else True


@pytest.mark.parametrize("text", ["", "K", "0", "-1", "1G", "1.5K", "16 K tokens", "9" * 5000, str(2**40 + 1)])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="512, 16K or 1M"):
        parse_length(text)
