"""From the rules of an architecture to steps: these tensors of this checkpoint become those of the other one."""

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
    """Tensors that are read together, and what is written from them; names are those in the files.

    Attributes:
        sources: To read; none for tensors that are zero.
        targets: To write.
        function: From the first to the second.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    function: Callable[[Weights], Weights]


def plain_names(names: Iterable[str], prefix: str) -> dict[str, str]:
    """The names as they are in files, by what they are without `prefix`."""
    plain: dict[str, str] = {}
    for name in names:
        short = name.removeprefix(prefix)
        if short in plain:
            raise UserError(f"the checkpoint holds {plain[short]} and {name}, which are the same weight")
        plain[short] = name
    return plain


def steps(plan: Plan, checkpoint: Checkpoint, shapes: dict[str, Tensor], layers: int, outward: bool) -> list[Step]:
    """The steps that write all tensors of `shapes` from all tensors of `checkpoint`.

    Args:
        plan: With the rules.
        checkpoint: To read from.
        shapes: What the new model holds, a shared head not among it, on the meta device.
        layers: Number of layers.
        outward: Whether the checkpoint is ours, and the new model theirs.

    Raises:
        UserError: If weights are missing, or there are some that no rule reads.
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
    """The rule read from right to left."""
    return Rule(rule.ours, rule.theirs, rule.back, rule.function)


def _steps_of(
    rule: Rule, there: dict[str, str], here: dict[str, str], shapes: dict[str, Tensor], layers: int
) -> Iterator[Step]:
    """The steps of one rule: for each layer, its weights and its biases."""
    for layer in range(layers) if rule.is_of_layer else [0]:
        for suffix in ("weight", "bias"):
            sources = [f"{name.format(layer)}.{suffix}" for name in rule.theirs]
            targets = [f"{name.format(layer)}.{suffix}" for name in rule.ours]
            missing = [name for name in sources if name not in there]
            wanted = [here[name] for name in targets if name in here]
            if not missing and len(wanted) == len(targets):
                yield Step(tuple(there[name] for name in sources), tuple(wanted), rule.function)
            elif len(missing) == len(sources) and suffix == "bias":
                if wanted:  # a bias that is missing there is zero here
                    yield Step((), tuple(wanted), _zeros(shapes, wanted))
            elif missing and wanted:
                raise UserError(f"the checkpoint lacks {some_of(missing)}, which its config asks for")


def _zeros(shapes: dict[str, Tensor], names: list[str]) -> Callable[[Weights], Weights]:
    return lambda weights: [torch.zeros(shapes[name].shape) for name in names]


def _check_shared_head(checkpoint: Checkpoint, there: dict[str, str], rules: list[Rule]) -> None:
    """Refuse a head that is not what the config says it is: the embedding."""
    embedding = next(
        rule.theirs[0] for rule in rules if "embed_tokens" in rule.ours[0] or "embed_tokens" in rule.theirs[0]
    )
    if not torch.equal(checkpoint[there[HEAD]], checkpoint[there[f"{embedding}.weight"]]):
        raise UserError(
            f"{checkpoint.folder}: tie_word_embeddings says that the head is the embedding, but {HEAD} is another "
            "matrix; set tie_word_embeddings to false in a copy of its config"
        )


def _check(name: str, found: Tensor, expected: Tensor) -> None:
    """Refuse a tensor that differs from `expected` by more than the rounding of its dtype."""
    rounding = torch.finfo(found.dtype).eps if found.dtype.is_floating_point else 0.0
    if found.numel() != expected.numel() or ((found.flatten() - expected).abs() > rounding * expected).any():
        raise UserError(f"{name} holds {found.flatten().tolist()}, where {expected.tolist()} was expected")
