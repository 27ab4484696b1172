"""Whether the code runs, or is recorded: compiled, traced or exported. All that depends on it asks here.

While code is recorded, values of tensors are not known and a loop has the length that it has now. Checks of values
are left out then, and a computation is chosen that is right for every length.
"""

import torch
from torch import Tensor

from .private_torch import is_static


def is_recorded() -> bool:
    """Whether what runs now is compiled, traced or exported, so that values of tensors are not known."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exported() -> bool:
    """Whether what runs now is recorded for another program, which gets plain operators only."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_compiled() -> bool:
    """Whether `torch.compile` or `torch.export` records what runs now."""
    return torch.compiler.is_compiling()


def has_any_length(query: Tensor, key: Tensor) -> bool:
    """Whether what runs now is compiled for any number of queries or keys."""
    return is_compiled() and not (is_static(query.shape[2]) and is_static(key.shape[2]))
