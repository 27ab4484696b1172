"""The attention backends: one record for each, and the lookup by name.

Each backend is one file with a forward function and its kernel calls: `eager.py`, `sdpa.py`, `flex.py`, `flash.py`.
All forward functions have the signature of `eager_attention_forward`. A backend never falls back to another one: it
computes the result or raises an error. Names outside this table raise an error, because Transformers' own
implementations would drop the bias.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from .eager import eager_attention_forward
from .flash import flash_attention_2_forward
from .flex import flex_attention_forward
from .sdpa import sdpa_attention_forward


class Backend(NamedTuple):
    """A backend and what it supports. Everything else raises an error.

    Attributes:
        forward: The function, with the signature of `eager_attention_forward`.
        devices: The devices on which it runs.
        dtypes: The dtypes of queries, keys and values that it accepts.
        masks: Whether it accepts a mask of queries times keys.
        gradients: The devices on which it has a backward pass.
        weights: Whether it returns attention weights.
        paged: Whether continuous batching can use it.
        any_bias: Whether it accepts a bias that is not linear in the distance.
    """

    forward: Callable
    devices: str
    dtypes: str
    masks: bool
    gradients: str
    weights: bool
    paged: bool
    any_bias: bool


_EVERYTHING: dict[str, Any] = {"devices": "all", "dtypes": "all", "masks": True, "gradients": "everywhere"}
_EVERYTHING |= {"paged": True, "any_bias": True}
_EAGER = Backend(eager_attention_forward, weights=True, **_EVERYTHING)
_SDPA = Backend(sdpa_attention_forward, weights=False, **_EVERYTHING)
_FLEX = Backend(
    flex_attention_forward,
    "CPU with a C++ compiler, GPU",
    "float32 and 16 bits",
    masks=True,
    gradients="GPU",
    weights=False,
    paged=False,
    any_bias=False,
)
_FLASH = Backend(
    flash_attention_2_forward,
    "CUDA with flash-attn or kernels",
    "16 bits",
    masks=False,
    gradients="everywhere, but not for slopes",
    weights=False,
    paged=False,
    any_bias=False,
)

BACKENDS = {
    "sdpa": _SDPA,
    "eager": _EAGER,
    "flex_attention": _FLEX,
    "flash_attention_2": _FLASH,
    # Transformers replaces flash_attention_2 by this name if flash-attn is missing and `kernels` is installed.
    "kernels-community/flash-attn2": _FLASH,
    # Transformers replaces eager by this name in continuous batching. The layout separates the requests (`paged.py`).
    "paged|eager": _EAGER,
}


def backend(attn_implementation: str) -> Backend:
    """Returns the backend of this name.

    Raises:
        ValueError: If no backend has this name.
    """
    if attn_implementation not in BACKENDS:
        raise ValueError(
            f'Specified `attn_implementation="{attn_implementation}"` is not supported: it does not know ALiBi '
            f"and would drop the bias; choose one of {', '.join(BACKENDS)}."
        )
    return BACKENDS[attn_implementation]


def check_any_bias(attn_implementation: str) -> None:
    """Checks that this backend accepts a bias that is not linear in the distance.

    Raises:
        ValueError: If it does not.
    """
    if not backend(attn_implementation).any_bias:
        others = ", ".join(name for name, other in BACKENDS.items() if other.any_bias)
        raise ValueError(
            f"{attn_implementation} computes linear biases only, but this model's bias is not linear in the distance; "
            f"choose one of {others}."
        )
