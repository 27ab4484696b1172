"""The private names of PyTorch that this model uses: all of them, so that a new PyTorch has one place to break.

| name | what it must do | without it |
|---|---|---|
| `CPU_FLASH` | attention with a bias of overlapping strides and any float dtype; returns the logarithm of the softmax's sum | `sdpa` on the CPU loops over the public kernel, which is slower and looks at every key |
| `CPU_FLASH_BACKWARD` | the gradients of that, given its two results | as `CPU_FLASH` |
| `TRANSFORMS_ARE_ACTIVE` | whether a transform of `torch.func` runs, of which the model's own operator knows nothing | as `CPU_FLASH`; PyTorch then refuses what it cannot differentiate |
| `MASKED_INDEX` | an element of a table, in code that FlexAttention compiles for the CPU, without naming a size | plain indexing, which some PyTorch versions fail to compile there |
| `is_static` | whether a compiled graph knows the value of a size | graphs are for any size, which is slower |

A name that is missing is `None` here, and the last column applies: a checkpoint loads and is right. What each one must
do is tested, so that a change of meaning is noticed before a release is said to work with that PyTorch.
"""  # noqa: E501

from typing import Any

import torch

CPU_FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
CPU_FLASH_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
TRANSFORMS_ARE_ACTIVE: Any = getattr(torch._C, "_are_functorch_transforms_active", None)
MASKED_INDEX: Any = getattr(torch.ops.aten, "_unsafe_masked_index", None)


def has_own_operator() -> bool:
    """Whether this PyTorch has all that the model's own operator for the CPU stands on."""
    return all(part is not None for part in (CPU_FLASH, CPU_FLASH_BACKWARD, TRANSFORMS_ARE_ACTIVE))


def is_static(size: Any) -> bool:
    """Whether the value of a size is known in the graph that is being compiled."""
    try:
        from torch.fx.experimental.symbolic_shapes import has_static_value
    except ImportError:
        return False
    return has_static_value(size)
