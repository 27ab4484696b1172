"""What one call of attention computes with: states, slopes, and the numbers that go with them.

Every backend begins with `attention_inputs`, and hands the result on as one value.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import TokenLayout
from .recording import has_any_length
from .tiles import FEW_KEYS
from .windows import head_windows, norm_bounds

QUERY_BLOCK = 512  # queries that get a stored bias at a time; fewer are not worth looking at norms for windows


class AttentionInputs(NamedTuple):
    """The inputs of one call.

    Attributes:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_value_heads, keys, head_dim]`.
        value: `[batch, key_value_heads, keys, head_dim]`.
        slopes: `[heads]`, in nats per token.
        scaling: Factor of the scores before the bias is added.
        dropout: Probability of dropping an attention weight.
        windows: How far back each query head looks, `[heads]`; `None`: to the first key.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor
    scaling: float
    dropout: float = 0.0
    windows: Tensor | None = None

    def with_states(self, query: Tensor, key: Tensor, value: Tensor) -> "AttentionInputs":
        """Returns the same with other states."""
        return self._replace(query=query, key=key, value=value)

    def to(self, dtype: torch.dtype) -> "AttentionInputs":
        """Returns the same with states of another dtype."""
        return self.with_states(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype))

    def with_all_heads(self) -> "AttentionInputs":
        """Returns the same with keys and values repeated for the query heads that share them."""
        groups = self.query.shape[1] // self.key.shape[1]
        return self.with_states(
            self.query, self.key.repeat_interleave(groups, 1), self.value.repeat_interleave(groups, 1)
        )

    def with_lossless_windows(self, tolerance: float) -> "AttentionInputs":
        """Returns the same with windows, unless looking at every key is as fast.

        The windows follow from the norms of the queries and keys at hand, never from weights. So an adapter, a hook, a
        shard, or weights that have changed since a key was cached cannot make them too narrow. Few queries are not
        worth that cost.

        Args:
            tolerance: The fraction of a head's attention that may be lost, `AlibiGPTConfig.window_tolerance`.
        """
        query, key = self.query, self.key
        is_worth_it = has_any_length(query, key) or (key.shape[2] > FEW_KEYS and query.shape[2] >= QUERY_BLOCK)
        if not tolerance or not is_worth_it:
            return self
        return self._replace(windows=head_windows(self.slopes, norm_bounds(query, key, self.scaling), tolerance))


def attention_inputs(
    module: Any, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scaling: float, dropout: float
) -> AttentionInputs:
    """Returns the inputs with this rank's slopes, the dtype of autocast, and without unused slots of a static cache.

    Args:
        module: The attention module, for `local_slopes`.
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_value_heads, keys, head_dim]`.
        value: `[batch, key_value_heads, keys, head_dim]`.
        layout: Positions and visibility of the tokens.
        scaling: Factor of the scores before the bias is added.
        dropout: Probability of dropping an attention weight.
    """
    slopes, device = local_slopes(module, layout.slopes, query), query.device.type
    inputs = AttentionInputs(query, key, value, slopes, scaling, dropout)
    if torch.is_autocast_enabled(device):
        inputs = inputs.to(torch.get_autocast_dtype(device))
    if layout.length is not None:
        keys = slice(layout.length)
        inputs = inputs._replace(key=inputs.key[:, :, keys], value=inputs.value[:, :, keys])
    return inputs


def local_slopes(module: Any, slopes: Tensor, query: Tensor) -> Tensor:
    """Returns the slopes of the query heads at hand, on their device: all, or those of this tensor-parallel rank.

    Args:
        module: The attention module; with fewer heads than slopes, its `q_proj` knows the device mesh.
        slopes: `[heads]`, the slopes of all query heads.
        query: `[batch, heads at hand, queries, head_dim]`.
    """
    num_heads, slopes = query.shape[1], slopes.to(query.device)
    if num_heads == len(slopes):
        return slopes
    mesh = module.q_proj.weight.device_mesh
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    if slopes.requires_grad:
        slopes = slopes.view_as(slopes)  # a tensor of this layer's own, whose gradient is of the rank's heads only
        slopes.register_hook(lambda grad: _sum_of_ranks(grad, mesh.get_group()))
    rank = mesh.get_local_rank()
    return slopes[rank * num_heads : (rank + 1) * num_heads]


def _sum_of_ranks(states: Tensor, group: Any) -> Tensor:
    total = states.clone()
    dist.all_reduce(total, group=group)
    return total
