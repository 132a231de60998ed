"""What differs between versions of transformers: up to 5.23 it calls a model's cache `past_key_values`, from 5.24 on `cache`."""

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

from sala.errors import InputError

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def named(cache: Any) -> dict[str, Any]:
    """Return the cache as the keyword argument, or the field of an output, that the installed transformers has for it."""
    return {CACHE: cache}


def given(cache: Any, past_key_values: Any) -> Any:
    """Return the cache that a caller gave by either name.

    Raises:
        InputError: two caches were given.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise InputError(
            "cache and past_key_values are two caches; expected one of the two, they are names of the same"
        )
    return cache if past_key_values is None else past_key_values
