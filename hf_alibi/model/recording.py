"""Whether the code is being recorded, that is compiled, traced or exported. All decisions about it use this file.

While code is recorded, values of tensors are unknown, and loops get a fixed number of steps. The model then skips
checks of values and chooses computations that are right for every length. Tensors without data, on the meta device or
under `FakeTensorMode`, have no values either.
"""

import torch
from torch import Tensor

from .private_torch import is_fake, is_static


def is_recorded() -> bool:
    """Whether the code is being compiled, traced or exported, so that values of tensors are unknown."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def has_values(states: Tensor) -> bool:
    """Whether the values of a tensor may be read: the code is not being recorded, and the tensor has data."""
    return not is_recorded() and not states.is_meta and not is_fake(states)


def is_exported() -> bool:
    """Whether the code is being exported to another program, which supports only plain operators."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_compiled() -> bool:
    """Whether `torch.compile` or `torch.export` is recording the code."""
    return torch.compiler.is_compiling()


def has_any_length(query: Tensor, key: Tensor) -> bool:
    """Whether the code is being compiled for an unknown number of queries or keys."""
    return is_compiled() and not (is_static(query.shape[2]) and is_static(key.shape[2]))
