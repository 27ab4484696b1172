"""Norms, and what is known about the length of the vectors that come out of them."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_alibi_gpt import AlibiGPTConfig


class AlibiGPTRMSNorm(nn.RMSNorm):
    """RMSNorm with a gain that follows its input's dtype, which autocast may have lowered."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[..., size]` to the same shape, with root mean square 1 before the gain."""
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)


def make_norm(config: AlibiGPTConfig) -> nn.Module:
    """Returns a norm over `hidden_size` as the config says."""
    if config.norm_type == "rmsnorm":
        return AlibiGPTRMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


def known_gain(norm: nn.Module, size: int) -> Tensor | None:
    """Returns the gain `[size]` of a norm if it alone decides how large the output is, otherwise `None`.

    Hooks, a wrapper, a forward method that was replaced, and a subclass (which parametrizations and sharding make too)
    may do anything. A weight that is sharded, empty or offloaded is not the one that runs.
    """
    if type(norm) is not AlibiGPTRMSNorm or "forward" in vars(norm) or norm._forward_hooks or norm._forward_pre_hooks:
        return None
    gain: Any = getattr(norm, "weight", None)
    is_whole = type(gain) in (nn.Parameter, Tensor) and not gain.is_meta and gain.shape == (size,)
    return gain if is_whole and gain.untyped_storage().nbytes() > 0 else None
