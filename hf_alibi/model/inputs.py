"""The inputs of one attention call as one value: queries, keys, values, slopes, windows and scalars.

Each backend builds this value at the start of a call, all but `eager` with `attention_inputs`.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import TokenLayout
from .recording import has_any_length
from .tiles import FEW_KEYS, QUERY_BLOCK
from .windows import head_windows, norm_bounds


class AttentionInputs(NamedTuple):
    """The inputs of one attention call.

    Attributes:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_value_heads, keys, head_dim]`.
        value: `[batch, key_value_heads, keys, head_dim]`.
        slopes: `[heads]`, in nats per token, or `[heads, distances]` as in `TokenLayout.slopes`.
        scaling: Factor of the scores before the bias is added.
        dropout: Probability of dropping an attention weight.
        windows: `[heads]`, the distance that each query head sees; `None` for no limit.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor
    scaling: float
    dropout: float = 0.0
    windows: Tensor | None = None

    def with_states(self, query: Tensor, key: Tensor, value: Tensor) -> "AttentionInputs":
        """Returns a copy with other queries, keys and values."""
        return self._replace(query=query, key=key, value=value)

    def to(self, dtype: torch.dtype) -> "AttentionInputs":
        """Returns a copy with queries, keys and values in another dtype."""
        return self.with_states(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype))

    def of_heads(self, kv_heads: slice) -> "AttentionInputs":
        """Returns the part that belongs to these key-value heads."""
        size = self.query.shape[1] // self.key.shape[1]
        heads = slice(size * kv_heads.start, size * kv_heads.stop)
        part = self.with_states(self.query[:, heads], self.key[:, kv_heads], self.value[:, kv_heads])
        return part._replace(slopes=self.slopes[heads], windows=None if self.windows is None else self.windows[heads])

    def with_keys_from(self, first: int) -> "AttentionInputs":
        """Returns a copy without the keys before `first`."""
        return self.with_states(self.query, self.key[:, :, first:], self.value[:, :, first:])

    def with_all_heads(self) -> "AttentionInputs":
        """Returns a copy with keys and values repeated, so that each query head has its own."""
        groups = self.query.shape[1] // self.key.shape[1]
        return self.with_states(
            self.query, self.key.repeat_interleave(groups, 1), self.value.repeat_interleave(groups, 1)
        )

    def with_lossless_windows(self, tolerance: float, key_norms: Tensor | None = None) -> "AttentionInputs":
        """Returns a copy with lossless windows, or these inputs where windows would not save time.

        The windows are computed from the norms of the queries and keys of this call, never from weights. So adapters,
        hooks, sharding, and weights that changed after a key was cached cannot make them too narrow. For few queries,
        computing the norms of all keys would cost more than windows save.

        Args:
            tolerance: Fraction of a head's attention that may be lost, `AlibiGPTConfig.window_tolerance`.
            key_norms: `[key_value_heads]`, a bound of the norms of the keys, if the cache knows one.
        """
        query, key = self.query, self.key
        is_cheap = key_norms is not None or query.shape[2] >= QUERY_BLOCK
        is_worth_it = has_any_length(query, key) or (key.shape[2] > FEW_KEYS and is_cheap)
        # Only a linear bias gives windows.
        if not tolerance or not is_worth_it or self.slopes.dim() == 2:
            return self
        bounds = norm_bounds(query, key, self.scaling, key_norms)
        return self._replace(windows=head_windows(self.slopes, bounds, tolerance))


def attention_inputs(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scaling: float, dropout: float
) -> AttentionInputs:
    """Returns the inputs in the dtype of autocast, without unused slots of a static cache.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_value_heads, keys, head_dim]`.
        value: `[batch, key_value_heads, keys, head_dim]`.
        layout: Positions and visibility of the tokens.
        scaling: Factor of the scores before the bias is added.
        dropout: Probability of dropping an attention weight.
    """
    device = query.device.type
    inputs = AttentionInputs(query, key, value, layout.slopes.to(query.device), scaling, dropout)
    if device != "meta" and torch.is_autocast_enabled(device):
        inputs = inputs.to(torch.get_autocast_dtype(device))
    if layout.length is not None:
        keys = slice(layout.length)
        inputs = inputs._replace(key=inputs.key[:, :, keys], value=inputs.value[:, :, keys])
    return inputs


def without_autocast(device: str) -> Any:
    """Returns a context without autocast, which would round the bias to the low precision of the queries.

    The meta device has no autocast.
    """
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
