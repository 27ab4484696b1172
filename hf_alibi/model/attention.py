"""The attention backends: one record for each, and the lookup by name.

Each backend is one file, with its forward function and its kernel calls: `eager.py`, `sdpa.py`, `flex.py`, `flash.py`.
All have the signature of `eager_attention_forward`. A backend that is asked for is used or raises. A name that is not
in this table is refused: Transformers' own implementations would drop the bias.
"""

from collections.abc import Callable
from typing import NamedTuple

from .eager import eager_attention_forward
from .flash import flash_attention_2_forward
from .flex import flex_attention_forward
from .sdpa import sdpa_attention_forward


class Backend(NamedTuple):
    """What a backend can do. What it cannot do raises an error.

    Attributes:
        forward: Its function, with the signature of `eager_attention_forward`.
        devices: Where it runs.
        dtypes: Of queries, keys and values.
        masks: Whether it takes a mask of queries times keys.
        gradients: Where it has a backward pass.
        weights: Whether it returns attention weights.
        paged: Whether continuous batching can use it.
    """

    forward: Callable
    devices: str
    dtypes: str
    masks: bool
    gradients: str
    weights: bool
    paged: bool


_EAGER = Backend(eager_attention_forward, "all", "all", masks=True, gradients="everywhere", weights=True, paged=True)
_SDPA = Backend(sdpa_attention_forward, "all", "all", masks=True, gradients="everywhere", weights=False, paged=True)
_FLEX = Backend(
    flex_attention_forward,
    "CPU with a C++ compiler, GPU",
    "float32 and 16 bits",
    masks=True,
    gradients="GPU",
    weights=False,
    paged=False,
)
_FLASH = Backend(
    flash_attention_2_forward,
    "CUDA with flash-attn or kernels",
    "16 bits",
    masks=False,
    gradients="everywhere, but not for slopes",
    weights=False,
    paged=False,
)

BACKENDS = {
    "sdpa": _SDPA,
    "eager": _EAGER,
    "flex_attention": _FLEX,
    "flash_attention_2": _FLASH,
    # Transformers takes this for flash_attention_2 where the package is missing and `kernels` is installed.
    "kernels-community/flash-attn2": _FLASH,
    # Transformers makes this of eager for continuous batching; the layout tells the requests apart (`paged.py`).
    "paged|eager": _EAGER,
}


def backend(attn_implementation: str) -> Backend:
    """Returns the backend of that name.

    Raises:
        ValueError: If there is none.
    """
    if attn_implementation not in BACKENDS:
        raise ValueError(
            f'Specified `attn_implementation="{attn_implementation}"` is not supported: it does not know ALiBi '
            f"and would drop the bias; choose one of {', '.join(BACKENDS)}."
        )
    return BACKENDS[attn_implementation]
