"""Norm layers, and which of them bound the length of their output by their gain alone."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_alibi_gpt import AlibiGPTConfig


class AlibiGPTRMSNorm(nn.RMSNorm):
    """RMSNorm that casts its gain to the dtype of its input, which autocast may have lowered."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[..., size]` to the same shape, with root mean square 1 before the gain."""
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)


# With tensor parallelism, Transformers replaces `forward` by a function of this name. It computes the same and lets
# ranks sum the gradients of the gain. If the name changes, tensor parallelism has no windowed cache.
SUMS_GRADIENTS = "ReplicatedWithGradAllReduce.install_forward."


def make_norm(config: AlibiGPTConfig) -> nn.Module:
    """Returns a norm layer over `hidden_size`, of the type in the config."""
    if config.norm_type == "rmsnorm":
        return AlibiGPTRMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


def known_gain(norm: nn.Module, size: int) -> Tensor | None:
    """Returns the gain `[size]` of a norm if it alone decides how large the output is, otherwise `None`.

    The output may have any size with hooks, a wrapper, a replaced `forward`, or a subclass. Parametrizations and
    sharding make subclasses too. A sharded, empty or offloaded weight is not the one that is used in the forward pass.
    """
    replaced = vars(norm).get("forward")
    is_changed = replaced is not None and not getattr(replaced, "__qualname__", "").startswith(SUMS_GRADIENTS)
    if type(norm) is not AlibiGPTRMSNorm or is_changed or norm._forward_hooks or norm._forward_pre_hooks:
        return None
    gain: Any = getattr(norm, "weight", None)
    is_whole = type(gain) in (nn.Parameter, Tensor) and not gain.is_meta and gain.shape == (size,)
    return gain if is_whole and gain.untyped_storage().nbytes() > 0 else None
