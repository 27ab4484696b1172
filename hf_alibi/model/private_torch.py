"""All private names of PyTorch that the model uses, so that only this file depends on PyTorch's internals.

| name | what the model relies on | consequence if it is missing |
|---|---|---|
| `CPU_FLASH` | attention with a bias of overlapping strides and any float dtype; returns the logarithm of the softmax's sum | `sdpa` on the CPU loops over the public kernel, which is slower and looks at every key |
| `CPU_FLASH_BACKWARD` | the gradients of `CPU_FLASH`, given its two results | the same as for `CPU_FLASH` |
| `TRANSFORMS_ARE_ACTIVE` | whether a transform of `torch.func` is active, which the model's custom operator does not support | the same as for `CPU_FLASH`; PyTorch raises an error for what it cannot differentiate |
| `MASKED_INDEX` | an element of a table, in code that FlexAttention compiles for the CPU, without naming a size | plain indexing, which some PyTorch versions fail to compile there |
| `is_fake` | whether a tensor has only a shape, dtype and device, because `FakeTensorMode` made it | PyTorch raises an error for a mask or positions without data |
| `is_static` | whether a compiled graph knows the value of a size | graphs are made for any size, which is slower |

A missing name is `None`. A checkpoint still loads and gives right results, and the last column applies. A test for
each name shows whether a new PyTorch still does what the second column says.
"""  # noqa: E501

from typing import Any

import torch

CPU_FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
CPU_FLASH_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
TRANSFORMS_ARE_ACTIVE: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
MASKED_INDEX: Any = getattr(torch.ops.aten, "_unsafe_masked_index", None)


def has_own_operator() -> bool:
    """Whether this PyTorch has everything that the model's custom CPU operator needs."""
    return all(part is not None for part in (CPU_FLASH, CPU_FLASH_BACKWARD, TRANSFORMS_ARE_ACTIVE))


def is_fake(states: torch.Tensor) -> bool:
    """Whether a tensor was made by `FakeTensorMode`, so that it has no data."""
    return hasattr(states, "fake_mode")


def is_static(size: Any) -> bool:
    """Whether the value of a size is known in the graph that is being compiled."""
    try:
        from torch.fx.experimental.symbolic_shapes import has_static_value
    except ImportError:
        return False
    return has_static_value(size)
