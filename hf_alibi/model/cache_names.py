"""The name of the KV cache in Transformers: `past_key_values` up to version 5.23, `cache` since 5.24.

Models accept both names as arguments. `generate` and the output classes use the name of the installed version.
"""

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def only_cache(past_key_values: Any, cache: Any) -> Any:
    """Returns the cache that was passed under one of its two names, or `None`.

    Raises:
        ValueError: If both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument; give only one of them.")
    return cache if past_key_values is None else past_key_values
