"""Norm layers, and which of them bound the length of their output by their gain alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_alibi_gpt import AlibiGPTConfig


class AlibiGPTRMSNorm(nn.RMSNorm):
    """RMSNorm that casts its gain, if it has one, to the dtype of its input, which autocast may have lowered."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps `[..., size]` to the same shape, with root mean square 1 before the gain."""
        gain = None if self.weight is None else self.weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, self.normalized_shape, gain, self.eps)


class AlibiGPTHeadRMSNorm(nn.Module):
    """RMSNorm over the channels of each head, with one gain a head.

    Transformers sets the weights of classes with "RMSNorm" in their name to 1.
    """

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(heads))

    def forward(self, hidden_states: Tensor, heads: slice = slice(None)) -> Tensor:
        """Maps `[..., heads, size]` to the same shape.

        Args:
            hidden_states: `[..., heads, size]`.
            heads: Which heads these are; all by default. With tensor parallelism a rank has some of them.
        """
        normed = F.rms_norm(hidden_states, (self.size,), None, self.eps)
        return normed * self.weight[heads].to(normed.dtype)[:, None]


# With tensor parallelism, Transformers replaces `forward` by a function of this name. It computes the same and lets
# ranks sum the gradients of the gain. If the name changes, tensor parallelism has no windowed cache.
SUMS_GRADIENTS = "ReplicatedWithGradAllReduce.install_forward."


def make_norm(config: AlibiGPTConfig) -> nn.Module:
    """Returns a norm layer over `hidden_size`, of the type in the config."""
    if config.norm_type == "rmsnorm":
        return AlibiGPTRMSNorm(config.hidden_size, eps=config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


def make_qk_norms(config: AlibiGPTConfig) -> tuple[nn.Module, nn.Module]:
    """Returns the norms of queries and of keys. Without QK-norm, they change nothing."""
    size, eps = config.head_dim, config.norm_eps
    if not config.qk_norm:
        return nn.Identity(), nn.Identity()
    if config.qk_norm_gain == "channel":
        return AlibiGPTRMSNorm(size, eps=eps), AlibiGPTRMSNorm(size, eps=eps)
    queries, keys = (AlibiGPTRMSNorm(size, eps=eps, elementwise_affine=False) for _ in range(2))
    if config.qk_norm_gain == "head":
        # A score is a product, so a second gain, on the keys, would add nothing.
        return AlibiGPTHeadRMSNorm(config.num_attention_heads, size, eps), keys
    return queries, keys


def known_gain(norm: Any, heads: int, size: int) -> Tensor | None:
    """Returns the gain of a norm of queries or keys if it alone decides how large the output is, otherwise `None`.

    The output may have any size with hooks, a wrapper, a replaced `forward`, or a subclass. Parametrizations and
    sharding make subclasses too. A sharded, empty or offloaded weight is not the one that is used in the forward pass.

    Args:
        norm: The norm.
        heads: Number of query heads.
        size: Channels of a head.

    Returns:
        A gain for each channel, `[size]`; one for each head, `[heads, 1]`; or 1, `[1]`, of a norm that has none.
    """
    replaced = vars(norm).get("forward")
    is_changed = replaced is not None and not getattr(replaced, "__qualname__", "").startswith(SUMS_GRADIENTS)
    has_heads = type(norm) is AlibiGPTHeadRMSNorm
    is_plain = has_heads or type(norm) is AlibiGPTRMSNorm
    if not is_plain or is_changed or norm._forward_hooks or norm._forward_pre_hooks:
        return None
    gain: Any = getattr(norm, "weight", None)
    if not has_heads and not norm.elementwise_affine:
        return torch.ones(1) if gain is None else None
    is_whole = type(gain) in (nn.Parameter, Tensor) and not gain.is_meta
    if not is_whole or gain.shape != ((heads,) if has_heads else (size,)) or not gain.untyped_storage().nbytes():
        return None
    return gain[:, None] if has_heads else gain
