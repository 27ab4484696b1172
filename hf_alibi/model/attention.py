"""Attention with ALiBi, one signature for every implementation.

`eager` is the reference: it writes out scores, bias and softmax, and returns the attention weights.
`sdpa`, the default, calls PyTorch's fused kernels tile by tile (`causal.py`) and never stores a bias of
queries times keys. Padded and packed batches are cut into the runs of tokens that see each other, which
removes their masks altogether. `flex_attention` (`flex.py`) and `flash_attention_2` (`flash.py`) are for GPUs.

An implementation that is not in this file does not know ALiBi and is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .cache import HeldKeys
from .causal import attention_in_runs, causal_attention, is_one_operator, kernel
from .flash import alibi_flash_attention
from .flex import alibi_flex_attention
from .layout import TokenLayout
from .private_torch import is_static
from .tiles import FEW_KEYS
from .windows import head_windows, norm_bounds

QUERY_BLOCK = 512  # queries that get a stored bias at a time; fewer are not worth looking at norms for windows


def eager_attention_forward(
    module: Any,
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
    slopes = local_slopes(module, attention_mask.slopes, query)
    query, key, value = (states.to(slopes.dtype) for states in (query, key, value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling + attention_mask.dense_bias(slopes)
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ value).to(dtype).transpose(1, 2).contiguous(), weights.to(dtype)


def sdpa_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenLayout,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention through PyTorch's fused kernels; arguments as in `eager_attention_forward`, but no weights.

    Where a windowed cache holds other keys for each group of heads, `key` is a list of `HeldKeys`.
    """
    layout = attention_mask
    if isinstance(key, list):
        return _windowed(query, key, layout, scaling), None
    if _is_exported() or (_has_any_length(query, key) and not is_one_operator(dropout, query, key, value)):
        layout = layout._replace(length=None)  # no graph of a loop over blocks would be for other lengths too
    slopes = local_slopes(module, layout.slopes, query)
    device = query.device.type
    query, key, value = _prepared(query, key, value, layout)
    windows = None
    in_tiles = layout.length is not None or layout.runs is not None
    if device == "cpu" and in_tiles:  # where tiles can leave out keys
        windows = lossless_windows(module.config.window_tolerance, query, key, slopes, scaling)
    # Autocast would round the bias to the low precision of the queries.
    with torch.autocast(device, enabled=False):
        if layout.length is not None:
            output = causal_attention(query, key, value, slopes, scaling, dropout, windows)
        elif layout.runs is not None:
            output = attention_in_runs(query, key, value, slopes, scaling, dropout, windows, layout.runs)
        else:
            output = _masked(query, key, value, slopes, scaling, dropout, layout)
    return output.transpose(1, 2).contiguous(), None


def flex_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenLayout,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention through FlexAttention; arguments as in `eager_attention_forward`, but no weights.

    Raises:
        ValueError: For dropout, for float64, and if the weights are asked for.
        NotImplementedError: If gradients are needed on the CPU.
    """
    _refuse_weights("flex_attention", **kwargs)
    if dropout:
        raise ValueError(f"flex_attention has no dropout, got attention_dropout={dropout}; use 0, or sdpa.")
    slopes = local_slopes(module, attention_mask.slopes, query)
    query, key, value = _prepared(query, key, value, attention_mask)
    windows = None
    # A few queries are not worth waiting for the windows, and a compiled graph cannot wait for them.
    if not torch.compiler.is_compiling() and query.shape[2] >= QUERY_BLOCK:
        windows = lossless_windows(module.config.window_tolerance, query, key, slopes, scaling)
    with torch.autocast(query.device.type, enabled=False):
        output = alibi_flex_attention(query, key, value, slopes, scaling, attention_mask, windows)
    return output.transpose(1, 2).contiguous(), None


def flash_attention_2_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenLayout,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention through FlashAttention 2; arguments as in `eager_attention_forward`, but no weights.

    Raises:
        ValueError: For float32 and float64, a mask of queries times keys, slopes that are trained, and if the
            weights are asked for.
    """
    _refuse_weights("flash_attention_2", **kwargs)
    slopes = local_slopes(module, attention_mask.slopes, query)
    query, key, value = _prepared(query, key, value, attention_mask)
    # Only here, as a checkpoint must load where Transformers has moved this.
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    (flash, flash_varlen, *_), _ = lazy_import_flash_attention(module.config._attn_implementation)
    return alibi_flash_attention(
        query, key, value, slopes, scaling, dropout, attention_mask, flash, flash_varlen
    ), None


def _refuse_weights(attn_implementation: str, output_attentions: bool | None = None, **kwargs: Any) -> None:
    if output_attentions:
        raise ValueError(f"{attn_implementation} computes no attention weights to output; use eager.")


def _prepared(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the states in the dtype that autocast asks for, without the room that a static cache has left."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (states.to(torch.get_autocast_dtype(device)) for states in (query, key, value))
    if layout.length is not None:
        key, value = key[:, :, : layout.length], value[:, :, : layout.length]
    return query, key, value


def lossless_windows(tolerance: float, query: Tensor, key: Tensor, slopes: Tensor, scaling: float) -> Tensor | None:
    """Returns how far back each query head needs to look, `[heads]`, or `None` if looking at everything is as fast.

    The windows follow from the norms of the queries and keys at hand, never from weights: an adapter, a hook, a shard
    or the weights that a cached key was made with cannot make them too narrow. Few queries are not worth that cost.
    """
    is_worth_it = _has_any_length(query, key) or (key.shape[2] > FEW_KEYS and query.shape[2] >= QUERY_BLOCK)
    if not tolerance or not is_worth_it:
        return None
    return head_windows(slopes, norm_bounds(query, key, scaling), tolerance)


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scaling: float,
    dropout: float,
    layout: TokenLayout,
) -> Tensor:
    """Anything else: a stored bias, for one block of queries at a time; those of which nothing is asked get zeros."""
    if _is_exported():
        # Not every engine shares key-value heads, or takes a bias of higher precision than the queries.
        groups, dtype = query.shape[1] // key.shape[1], query.dtype
        query, key, value = (states.to(slopes.dtype) for states in (query, key, value))
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        output = kernel(query, key, value, layout.dense_bias(slopes), scaling, dropout).to(dtype)
    elif _has_any_length(query, key):
        output = kernel(query, key, value, layout.dense_bias(slopes), scaling, dropout)
    else:
        blocks = [slice(start, start + QUERY_BLOCK) for start in range(0, query.shape[2], QUERY_BLOCK)]
        outputs = [
            kernel(query[:, :, rows], key, value, layout.dense_bias(slopes, rows), scaling, dropout) for rows in blocks
        ]
        output = torch.cat(outputs, dim=2)
    if layout.query_mask is None:
        return output
    return output.masked_fill(~layout.query_mask[:, None, :, None], 0)


def _is_exported() -> bool:
    """Whether what runs now is recorded for another program."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _has_any_length(query: Tensor, key: Tensor) -> bool:
    """Whether what runs now is compiled for any number of queries or keys."""
    return torch.compiler.is_compiling() and not (is_static(query.shape[2]) and is_static(key.shape[2]))


def _windowed(query: Tensor, held: list[HeldKeys], layout: TokenLayout, scaling: float) -> Tensor:
    """Every group of heads attends to the keys that it holds; returns `[batch, queries, heads, head_dim]`."""
    output = torch.empty_like(query.transpose(1, 2))
    for group in held:
        ring = group.ring
        q, slopes = query[:, ring.heads], layout.slopes[ring.heads]
        with torch.autocast(query.device.type, enabled=False):
            if not group.only_future_is_hidden(layout):
                part = _masked(q, group.keys, group.values, slopes, scaling, 0.0, group.layout(layout))
            elif group.in_order:
                part = causal_attention(q, group.keys, group.values, slopes, scaling, 0.0, ring.windows)
            else:
                bias = ring.bias(q.shape[2], group.length)
                part = kernel(q.flip(2), group.keys, group.values, bias, scaling, 0.0).flip(2)
        output[:, :, ring.heads] = part.transpose(1, 2)
    return output


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


class AlibiAttentionInterface(dict[str, Callable]):
    """The implementations that know ALiBi, by name; Transformers' own would drop the bias."""

    def get_interface(self, attn_implementation: str, default: Callable) -> Callable:
        """Returns the implementation of that name.

        Raises:
            ValueError: If it does not know ALiBi.
        """
        if attn_implementation not in self:
            raise ValueError(
                f'Specified `attn_implementation="{attn_implementation}"` is not supported: it does not know ALiBi '
                f"and would drop the bias; choose one of {', '.join(self)}."
            )
        return self[attn_implementation]


ALL_ATTENTION_FUNCTIONS = AlibiAttentionInterface(
    {
        "eager": eager_attention_forward,
        "sdpa": sdpa_attention_forward,
        "flex_attention": flex_attention_forward,
        "flash_attention_2": flash_attention_2_forward,
        # What Transformers takes for flash_attention_2 where the package is missing and `kernels` is installed.
        "kernels-community/flash-attn2": flash_attention_2_forward,
        # What Transformers makes of eager for continuous batching; the layout tells the requests apart (`paged.py`).
        "paged|eager": eager_attention_forward,
    }
)
