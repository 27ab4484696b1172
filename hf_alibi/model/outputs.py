"""Optional outputs of a model: hidden states, attention weights, and tuples in place of output classes.

Transformers has decorators for this, but they are private and have moved before. This code is saved with checkpoints
and has to work for years.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def is_asked(name: str, given: dict[str, Any], config: Any) -> Any:
    """Returns an argument of `forward`, such as `output_attentions`, or the config's value if it is not given."""
    value = given.get(name)
    return getattr(config, name, None) if value is None else value


def as_asked(outputs: Any, return_dict: bool | None, config: Any) -> Any:
    """Returns the outputs, or a tuple of them if `return_dict` is false. Without the argument, the config decides."""
    if return_dict is None:
        return_dict = getattr(config, "return_dict", True)
    return outputs if return_dict else outputs.to_tuple()


def selected_states(states: list[Tensor], wanted: bool | int | Sequence[int]) -> tuple[Any, ...]:
    """Returns the hidden states, with `None` in place of those that `output_hidden_states` does not request.

    Args:
        states: One tensor before the first layer, and one after each layer.
        wanted: True for all states, or one or several indices. Negative indices count from the end.
    """
    if isinstance(wanted, bool):
        return tuple(states)
    indices = [wanted] if isinstance(wanted, int) else wanted
    kept = {index % len(states) for index in indices if -len(states) <= index < len(states)}
    return tuple(state if index in kept else None for index, state in enumerate(states))
