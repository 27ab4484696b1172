"""How an architecture is told apart from ours: a table of weights, and what a rule of that table can do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Weights = list[Tensor]
Read = Callable[[str], Tensor]  # the weight of a name
Reference = Callable[[dict[str, Any], Read, Tensor], Tensor]  # config, weights, tokens [length] -> logits, float64


def same(weights: Weights) -> Weights:
    """The weights as they are."""
    return weights


@dataclass(frozen=True)
class Rule:
    """Weights of one side, and the weights of the other side that hold the same.

    Attributes:
        theirs: Names of modules there, with `{}` for the number of the layer. A rule serves their weight and bias.
        ours: Names of modules here.
        function: Maps the weights, or the biases, of `theirs` to those of `ours`.
        back: Maps those of `ours` to those of `theirs`; only used on the way out.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    function: Callable[[Weights], Weights] = same
    back: Callable[[Weights], Weights] = same

    @property
    def is_of_layer(self) -> bool:
        """Whether there is one for each layer."""
        return "{}" in self.theirs[0]


@dataclass
class Plan:
    """What becomes of a config and the weights that it describes.

    Attributes:
        fields: The fields of the config on the other side.
        rules: The table of the weights.
        ignored: Regular expressions of the names of tensors that hold no weights: masks, slopes.
        prefix: What names of tensors have in front in a language model, and lack in a decoder without its head.
        folded: What was multiplied into weights, a sentence each. Such weights are no copies.
        differs: What the converted model does otherwise than its source, a sentence each.
        reference: The source's formula in float64, where Transformers has no class for it, or none that heeds this
            config.
        is_near_class: Whether, though there is a formula, Transformers' class is near enough to be compared as well.
        checks: Names of tensors that are not taken, with what they must hold.
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


def renames(table: dict[str, str]) -> list[Rule]:
    """Rules for weights that only have another name; keys are theirs."""
    return [Rule((theirs,), (ours,)) for theirs, ours in table.items()]


def transposes(table: dict[str, str]) -> list[Rule]:
    """Rules for the `Conv1D` of GPT-2, a linear layer that holds its matrix transposed."""
    return [Rule((theirs,), (ours,), transposed) for theirs, ours in table.items()]


def transposed(weights: Weights) -> Weights:
    """Matrices transposed, biases as they are."""
    return [weight.t() if weight.ndim == 2 else weight for weight in weights]


def scaled(factor: float, before: Callable[[Weights], Weights] = same, which: Sequence[int] = (0,)) -> Callable:
    """A map that multiplies the outputs numbered `which` of `before` by `factor`, in float32."""

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
    """A map from one matrix, or bias, to its blocks of so many rows."""
    return lambda weights: list(weights[0].split(sizes))


def joined(weights: Weights) -> Weights:
    """The way back from `stacked`."""
    return [torch.cat(weights)]


def interleaved(groups: int, head_dim: int) -> Callable[[Weights], Weights]:
    """A map from queries, keys and values stored by groups of heads: `[group, queries + key + value, ...]`."""

    def split(weights: Weights) -> Weights:
        rows = weights[0].unflatten(0, (groups, -1, head_dim))
        return [part.flatten(0, 2) for part in (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])]

    return split


def interleaved_back(groups: int, head_dim: int) -> Callable[[Weights], Weights]:
    """The way back from `interleaved`."""

    def join(weights: Weights) -> Weights:
        return [torch.cat([weight.unflatten(0, (groups, -1, head_dim)) for weight in weights], 1).flatten(0, 2)]

    return join
