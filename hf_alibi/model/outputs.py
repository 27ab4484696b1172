"""What the caller of a model wants to get back: hidden states, attention weights, a tuple.

Transformers has decorators that do this. Their names are private and have moved before, and this code travels with
checkpoints for years.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def is_asked(name: str, given: dict[str, Any], config: Any) -> Any:
    """Returns the argument `name` of `forward`, such as `output_attentions`, or what the config says without one."""
    value = given.get(name)
    return getattr(config, name, None) if value is None else value


def as_asked(outputs: Any, return_dict: bool | None, config: Any) -> Any:
    """Returns the outputs, or a tuple of them if `return_dict` is false in the call or, without it, in the config."""
    if return_dict is None:
        return_dict = getattr(config, "return_dict", True)
    return outputs if return_dict else outputs.to_tuple()


def selected_states(states: list[Tensor], wanted: bool | int | Sequence[int]) -> tuple[Any, ...]:
    """Returns the hidden states, with `None` in place of those that `output_hidden_states` does not ask for.

    Args:
        states: One tensor before the first layer, and one after each layer.
        wanted: True for all of them, or the index or indices of some, negative ones counted from the end.
    """
    if isinstance(wanted, bool):
        return tuple(states)
    indices = [wanted] if isinstance(wanted, int) else wanted
    kept = {index % len(states) for index in indices if -len(states) <= index < len(states)}
    return tuple(state if index in kept else None for index, state in enumerate(states))
