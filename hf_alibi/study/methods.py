"""The position methods that a study compares, and rules for the slopes that its ablations vary.

To add a method, add a line to `METHODS`. Importing `hf_alibi.positions` registers the models.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .. import positions as positions
from ..model.alibi import alibi_slopes


@dataclass(frozen=True)
class Method:
    """A position method.

    Attributes:
        model_type: The model with this method, as the Auto classes know it.
        label: Its name in tables and plots.
        config: Fields of the config, if they differ from the defaults of `model_type`.
    """

    model_type: str
    label: str
    config: dict[str, Any] = field(default_factory=dict)


METHODS = {
    "alibi": Method("alibi_gpt", "ALiBi"),
    "sinusoidal": Method("sinusoidal_gpt", "sinusoidal"),
    "rotary": Method("rotary_gpt", "rotary"),
    "t5": Method("t5_gpt", "T5 bias"),
    "none": Method("nope_gpt", "none (NoPE)"),
    "alibi_learned": Method("alibi_gpt", "ALiBi, learned slopes", {"alibi_slopes_trainable": True}),
    "learned": Method("learned_gpt", "learned"),
    "kerple": Method("kerple_gpt", "KERPLE"),
    "hype": Method("hype_gpt", "HyPE"),
    "fox": Method("fox_gpt", "FoX"),
}


def uniform(heads: int) -> list[float]:
    """Returns the same slope for every head: the geometric mean of the paper's."""
    return [math.exp(sum(map(math.log, alibi_slopes(heads))) / heads)] * heads


def shifted(heads: int) -> list[float]:
    """Returns 2^(-8h / (n-1)) for h from 0 to n-1, a formula of other codes. It gives slopes from 1 to 2^-8."""
    return [2.0 ** (-8 * head / max(1, heads - 1)) for head in range(heads)]


SLOPES: dict[str, Callable[[int], list[float]]] = {
    "halved": lambda heads: [slope / 2 for slope in alibi_slopes(heads)],
    "doubled": lambda heads: [slope * 2 for slope in alibi_slopes(heads)],
    "uniform": uniform,
    "shifted": shifted,
}
"""Rules for the slopes of an ablation, by name: from the number of heads to a slope for each."""
