"""Turns the rules of an architecture into steps, each of which reads some tensors and writes some others."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..tables import some_of
from .checkpoint import Checkpoint
from .rules import Plan, Rule, Weights

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Step:
    """Tensors that are read together, and the tensors that are made from them. Names are those in the files.

    Attributes:
        sources: To read. Empty for tensors that become zero.
        targets: To write.
        function: Maps the sources to the targets.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    function: Callable[[Weights], Weights]


def plain_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Returns the names in the files, by the same names without `prefix`."""
    plain: dict[str, str] = {}
    for name in names:
        short = name.removeprefix(prefix)
        if short in plain:
            raise UserError(f"the checkpoint holds {plain[short]} and {name}, which are the same weight")
        plain[short] = name
    return plain


def steps(plan: Plan, checkpoint: Checkpoint, shapes: dict[str, Tensor], layers: int, outward: bool) -> list[Step]:
    """Returns the steps that write all tensors of `shapes` from all tensors of `checkpoint`.

    Args:
        plan: Has the rules.
        checkpoint: The source.
        shapes: All tensors of the new model but a shared head, on the meta device.
        layers: Number of layers.
        outward: Whether an AlibiGPT is converted to another model, and not the other way round.

    Raises:
        UserError: If weights are missing, or no rule reads some of them.
    """
    there = plain_names(checkpoint.files, "" if outward else plan.prefix)
    here = plain_names(shapes, plan.prefix if outward else "")
    rules = [_turned(rule) for rule in plan.rules] if outward else list(plan.rules)
    if HEAD in here and all(rule.ours != ("lm_head",) for rule in rules):
        rules.append(Rule(("lm_head",), ("lm_head",)))
    found = [step for rule in rules for step in _steps_of(rule, there, here, shapes, layers)]
    read = {name for step in found for name in step.sources} | {there[name] for name in plan.checks if name in there}
    unread = {short: name for short, name in there.items() if name not in read}
    if HEAD in unread and HEAD not in here:
        _check_shared_head(checkpoint, there, rules)
        del unread[HEAD]
    unread = {short: name for short, name in unread.items() if not any(re.fullmatch(p, short) for p in plan.ignored)}
    if unread:
        raise UserError(
            f"{checkpoint.folder} holds weights that its config has no place for: {some_of(unread.values())}"
        )
    unwritten = set(shapes) - {name for step in found for name in step.targets}
    if unwritten:
        raise UserError(f"{checkpoint.folder} has nothing for {some_of(unwritten)}")
    for short, expected in plan.checks.items():
        if short in there:
            _check(there[short], checkpoint[there[short]], expected)
    return found


def _turned(rule: Rule) -> Rule:
    """Returns the rule for the opposite direction."""
    return Rule(rule.ours, rule.theirs, rule.back, rule.function)


def _steps_of(
    rule: Rule, there: dict[str, str], here: dict[str, str], shapes: dict[str, Tensor], layers: int
) -> Iterator[Step]:
    """Yields the steps of one rule: for each layer, weights and biases."""
    for layer in range(layers) if rule.is_of_layer else [0]:
        for suffix in ("weight", "bias"):
            sources = [f"{name.format(layer)}.{suffix}" for name in rule.theirs]
            targets = [f"{name.format(layer)}.{suffix}" for name in rule.ours]
            missing = [name for name in sources if name not in there]
            wanted = [here[name] for name in targets if name in here]
            if not missing and len(wanted) == len(targets):
                yield Step(tuple(there[name] for name in sources), tuple(wanted), rule.function)
            elif len(missing) == len(sources) and suffix == "bias":
                if wanted:
                    # A bias that the source lacks is zero.
                    yield Step((), tuple(wanted), _zeros(shapes, wanted))
            elif missing and wanted:
                raise UserError(f"the checkpoint lacks {some_of(missing)}, which its config asks for")


def _zeros(shapes: dict[str, Tensor], names: list[str]) -> Callable[[Weights], Weights]:
    return lambda weights: [torch.zeros(shapes[name].shape) for name in names]


def _check_shared_head(checkpoint: Checkpoint, there: dict[str, str], rules: list[Rule]) -> None:
    """Raises an error if a head is not the embedding, though the config says so."""
    embedding = next(
        rule.theirs[0] for rule in rules if "embed_tokens" in rule.ours[0] or "embed_tokens" in rule.theirs[0]
    )
    if not torch.equal(checkpoint[there[HEAD]], checkpoint[there[f"{embedding}.weight"]]):
        raise UserError(
            f"{checkpoint.folder}: tie_word_embeddings says that the head is the embedding, but {HEAD} is another "
            "matrix; set tie_word_embeddings to false in a copy of its config"
        )


def _check(name: str, found: Tensor, expected: Tensor) -> None:
    """Raises an error for a tensor that differs from `expected` by more than the rounding of its dtype."""
    rounding = torch.finfo(found.dtype).eps if found.dtype.is_floating_point else 0.0
    if found.numel() != expected.numel() or ((found.flatten() - expected).abs() > rounding * expected).any():
        raise UserError(f"{name} holds {found.flatten().tolist()}, where {expected.tolist()} was expected")
