"""What differs between versions of transformers: up to 5.23 it calls a model's cache `past_key_values`, from 5.24 on `cache`."""

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def named(cache: Any) -> dict[str, Any]:
    """Return the cache as the keyword argument, or the field of an output, that the installed transformers has for it."""
    return {CACHE: cache}
