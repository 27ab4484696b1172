"""The plan of a conversion: the new config, the table of weights, and the functions that map weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Weights = list[Tensor]
# Returns the weight of a name.
Read = Callable[[str], Tensor]
# Maps a config, its weights and tokens [length] to logits [length, vocab_size] in float64.
Reference = Callable[[dict[str, Any], Read, Tensor], Tensor]


def same(weights: Weights) -> Weights:
    """Returns the weights unchanged."""
    return weights


@dataclass(frozen=True)
class Rule:
    """A line of the table: modules of the other model, and our modules with the same weights.

    Attributes:
        theirs: Names of the other model's modules, with `{}` for the number of the layer. The rule covers the weight
            and the bias of each.
        ours: Names of our modules.
        function: Maps the weights, or the biases, of `theirs` to those of `ours`.
        back: Maps those of `ours` to those of `theirs`, to convert an AlibiGPT.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    function: Callable[[Weights], Weights] = same
    back: Callable[[Weights], Weights] = same

    @property
    def is_of_layer(self) -> bool:
        """Whether the modules exist in each layer."""
        return "{}" in self.theirs[0]


@dataclass
class Plan:
    """How to convert the config and the weights of a checkpoint.

    Attributes:
        fields: The fields of the new config.
        rules: The table of the weights.
        ignored: Regular expressions for names of tensors that hold no weights, such as masks.
        prefix: Begins the names of tensors in a language model, and is missing in a decoder without head.
        folded: A sentence for each factor that was multiplied into weights. Such weights are not copies.
        differs: A sentence for each difference between the converted model and its source.
        reference: The source's formula in float64, if Transformers has no class that follows this config.
        is_near_class: Whether the difference from Transformers' class is stated as well, though there is a formula.
        checks: Values of tensors that are not converted, by name. Other values raise an error.
        max_length: Tokens that Transformers' class can read at most, if it has a limit and is run.
    """

    fields: dict[str, Any]
    rules: list[Rule]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    folded: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    reference: Reference | None = None
    is_near_class: bool = False
    checks: dict[str, Tensor] = field(default_factory=dict)
    max_length: int | None = None


def renames(table: dict[str, str]) -> list[Rule]:
    """Returns rules for modules that only have another name. Keys are their names, values ours."""
    return [Rule((theirs,), (ours,)) for theirs, ours in table.items()]


def transposes(table: dict[str, str]) -> list[Rule]:
    """Returns rules for GPT-2's `Conv1D`, a linear layer that stores its matrix transposed."""
    return [Rule((theirs,), (ours,), transposed) for theirs, ours in table.items()]


def transposed(weights: Weights) -> Weights:
    """Returns matrices transposed, and biases unchanged."""
    return [weight.t() if weight.ndim == 2 else weight for weight in weights]


def scaled(factor: float, before: Callable[[Weights], Weights] = same, which: Sequence[int] = (0,)) -> Callable:
    """Returns a function that multiplies some outputs of `before` by `factor`, in float32.

    Args:
        factor: With 1, outputs are unchanged and keep their dtype.
        before: Applied first.
        which: Indices of the outputs to multiply.
    """

    def scale(weights: Weights) -> Weights:
        outputs = before(weights)
        if factor == 1:
            return outputs
        return [
            weight.to(torch.promote_types(weight.dtype, torch.float32)) * factor if index in which else weight
            for index, weight in enumerate(outputs)
        ]

    return scale


QKV = tuple(f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkv")
GATE_UP = ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj")


def stacked(*sizes: int) -> Callable[[Weights], Weights]:
    """Returns a function that splits one matrix or bias into blocks of `sizes` rows."""
    return lambda weights: list(weights[0].split(sizes))


def joined(weights: Weights) -> Weights:
    """Joins what `stacked` splits."""
    return [torch.cat(weights)]


def interleaved(groups: int, head_dim: int) -> Callable[[Weights], Weights]:
    """Returns a function that splits a matrix stored by groups of heads, `[group, queries + key + value, ...]`."""

    def split(weights: Weights) -> Weights:
        rows = weights[0].unflatten(0, (groups, -1, head_dim))
        return [part.flatten(0, 2) for part in (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])]

    return split


def interleaved_back(groups: int, head_dim: int) -> Callable[[Weights], Weights]:
    """Returns a function that joins what `interleaved` splits."""

    def join(weights: Weights) -> Weights:
        return [torch.cat([weight.unflatten(0, (groups, -1, head_dim)) for weight in weights], 1).flatten(0, 2)]

    return join
