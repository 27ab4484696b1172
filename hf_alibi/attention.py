"""Attention with ALiBi, one signature for every implementation.

`eager` is the reference: it writes out scores, bias and softmax, and returns the attention weights.
`sdpa`, the default, calls PyTorch's fused kernels and never stores a bias of queries times keys: the
bias is a view of one line (`alibi.bias_view`), taken in blocks of queries. Padded and packed batches are
cut into the runs of tokens that see each other, which removes their masks altogether.

An implementation that is not in this file does not know ALiBi and is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from .alibi import bias_view, causal_line
from .layout import TokenLayout

QUERY_BLOCK = 512  # queries per kernel call: enough to fill it, few enough that half-hidden blocks cost little


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenLayout,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention from the formula, in float32 or better.

    Args:
        module: The attention module, for `local_slopes`.
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_value_heads, keys, head_dim]`.
        value: `[batch, key_value_heads, keys, head_dim]`.
        attention_mask: Positions and visibility of the tokens.
        scaling: Factor of the scores before the bias is added.
        dropout: Probability of dropping an attention weight; the caller passes 0 outside training.

    Returns:
        The output `[batch, queries, heads, head_dim]` and the weights `[batch, heads, queries, keys]`.
    """
    groups = query.shape[1] // key.shape[1]
    dtype = value.dtype
    slopes = local_slopes(module, attention_mask.slopes, query.shape[1])
    query, key, value = (states.to(slopes.dtype) for states in (query, key, value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling + attention_mask.dense_bias(slopes)
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ value).to(dtype).transpose(1, 2).contiguous(), weights.to(dtype)


def sdpa_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenLayout,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention through PyTorch's fused kernels; arguments as in `eager_attention_forward`, but no weights."""
    layout = attention_mask
    slopes = local_slopes(module, layout.slopes, query.shape[1])
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (states.to(torch.get_autocast_dtype(device)) for states in (query, key, value))
    # Autocast would round the bias to the low precision of the queries.
    with torch.autocast(device, enabled=False):
        if layout.length is not None:
            key, value = key[:, :, : layout.length], value[:, :, : layout.length]
            output = _causal(query, key, value, slopes, scaling, dropout)
        elif layout.segments is not None:
            output = _segmented(query, key, value, slopes, scaling, dropout, layout.segments)
        else:
            output = _masked(query, key, value, slopes, scaling, dropout, layout)
    return output.transpose(1, 2).contiguous(), None


def _causal(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, scaling: float, dropout: float) -> Tensor:
    """The queries are the last of the keys, and only the future is hidden."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    block = min(QUERY_BLOCK, num_queries)
    line = causal_line(slopes, behind=num_keys - 1, ahead=block - 1)
    backwards = query.flip(2)
    outputs = []
    for start in range(0, num_queries, block):
        queries = backwards[:, :, start : start + block]
        keys = num_keys - start
        bias = bias_view(line, queries.shape[2], keys, last=start)
        outputs.append(_kernel(queries, key[:, :, :keys], value[:, :, :keys], bias, scaling, dropout))
    return torch.cat(outputs, dim=2).flip(2)


def _segmented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scaling: float,
    dropout: float,
    segments: list[tuple[int, int]],
) -> Tensor:
    """Every run of tokens attends by itself, as if it were alone; padding in between gets zeros."""
    batch, heads, num_queries, head_dim = query.shape
    query, key, value = (
        states[:, :, :num_queries].transpose(1, 2).reshape(1, batch * num_queries, -1, head_dim).transpose(1, 2)
        for states in (query, key, value)
    )
    pieces, done = [], 0
    for start, end in segments:
        q, k, v = (states[:, :, start:end] for states in (query, key, value))
        pieces += [query.new_zeros(1, heads, start - done, head_dim), _causal(q, k, v, slopes, scaling, dropout)]
        done = end
    pieces.append(query.new_zeros(1, heads, batch * num_queries - done, head_dim))
    output = torch.cat(pieces, dim=2)
    return output.reshape(heads, batch, num_queries, head_dim).transpose(0, 1)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scaling: float,
    dropout: float,
    layout: TokenLayout,
) -> Tensor:
    """Anything else: a stored bias, for one block of queries at a time."""
    outputs = []
    for start in range(0, query.shape[2], QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        bias = layout.dense_bias(slopes, rows)
        outputs.append(_kernel(query[:, :, rows], key, value, bias, scaling, dropout))
    return torch.cat(outputs, dim=2)


def _kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float, dropout: float) -> Tensor:
    if query.device.type != "cpu":
        # Only the CPU's kernels read a bias of overlapping strides and of higher precision than the queries.
        bias = bias.to(query.dtype, copy=True, memory_format=torch.contiguous_format)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias.expand(query.shape[0], -1, -1, -1),
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def local_slopes(module: Any, slopes: Tensor, num_heads: int) -> Tensor:
    """Returns the slopes of the `num_heads` query heads that this tensor-parallel rank holds.

    Args:
        module: The attention module; its `q_proj` knows the device mesh.
        slopes: `[heads]`, the slopes of all query heads.
        num_heads: Number of query heads at hand.
    """
    slopes = slopes.to(module.q_proj.weight.device)
    if num_heads == len(slopes):
        return slopes
    mesh = module.q_proj.weight.device_mesh
    rank = mesh.get_local_rank("tp" if mesh.ndim > 1 else None)
    return slopes[rank * num_heads : (rank + 1) * num_heads]


class AlibiAttentionInterface(AttentionInterface):
    """The implementations that know ALiBi, by name; Transformers' own would drop the bias."""

    _global_mapping = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward}

    def get_interface(self, attn_implementation: str, default: Callable) -> Callable:
        """Returns the implementation of that name.

        Raises:
            ValueError: If it does not know ALiBi.
        """
        if attn_implementation not in self:
            raise ValueError(
                f"attn_implementation={attn_implementation!r} does not know ALiBi and would drop the bias; "
                f"choose one of {', '.join(self)}."
            )
        return self[attn_implementation]


ALL_ATTENTION_FUNCTIONS = AlibiAttentionInterface()
