"""FlashAttention 2 with ALiBi: the kernel adds -m |i - j| by itself, given the slopes.

It takes whole causal sequences, the queries being the last of the keys. Padding, documents and caches become
runs: stretches of queries, each with the keys that its last query sees, out of the flattened batch. Within a run
distances are those of a plain text, which is what the kernel assumes.

Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning"
(arXiv 2307.08691); ALiBi came to its package, flash-attn, with version 2.4.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import TokenLayout

HOW_TO_GET_FLASH_ATTENTION = (
    "On a CUDA machine, `pip install flash-attn` builds it and `pip install kernels` fetches it built; "
    "sdpa needs neither."
)


class Runs(NamedTuple):
    """Stretches of queries, each with the keys that its last query sees.

    Attributes:
        queries: `[all queries of the runs]`, indices into the flattened batch `[batch * queries]`.
        keys: `[all keys of the runs]`, indices into `[batch * keys]`.
        query_bounds: `[runs + 1]`, int32, where the runs begin and end in `queries`.
        key_bounds: `[runs + 1]`, int32, where they begin and end in `keys`.
        most_queries: Number of queries in the longest run.
        most_keys: Number of keys in the longest run.
    """

    queries: Tensor
    keys: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    most_queries: int
    most_keys: int


def alibi_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scaling: float,
    dropout: float,
    layout: TokenLayout,
    flash_attn_func: Callable[..., Tensor],
    flash_attn_varlen_func: Callable[..., Tensor],
) -> Tensor:
    """Attention through FlashAttention 2.

    Args:
        query: `[batch, heads, queries, head_dim]`, bfloat16 or float16.
        key: `[batch, key_value_heads, keys, head_dim]`; if `layout.length` is set, no more keys than that.
        value: `[batch, key_value_heads, keys, head_dim]`.
        slopes: `[heads]`.
        scaling: Factor of the scores before the bias is added.
        dropout: Probability of dropping an attention weight.
        layout: Positions and visibility of the tokens.
        flash_attn_func: The kernel of that name, for sequences of equal length.
        flash_attn_varlen_func: The kernel of that name, for runs.

    Returns:
        `[batch, queries, heads, head_dim]`; queries that are padding get zeros.

    Raises:
        ValueError: For float32 and float64, a mask of queries times keys, and slopes that are trained.
    """
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"flash_attention_2 computes in bfloat16 and float16, not in {query.dtype}: load the model with "
            "dtype=torch.bfloat16, run it under torch.autocast, or use sdpa."
        )
    if layout.mask is not None:
        raise ValueError(
            f"flash_attention_2 takes no mask of queries times keys, got one of shape {tuple(layout.mask.shape)}; "
            "use sdpa, or a mask of shape [batch, tokens]."
        )
    if torch.is_grad_enabled() and slopes.requires_grad:
        raise ValueError("flash_attention_2 has no gradient for slopes; train them with sdpa.")

    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    options = {"dropout_p": dropout, "softmax_scale": scaling, "causal": True, "alibi_slopes": slopes.float()}
    if layout.length is not None:
        return flash_attn_func(query, key, value, **options)
    batch, num_queries = query.shape[:2]
    if layout.segments is not None:
        key, value = key[:, :num_queries], value[:, :num_queries]
    if "runs" not in layout.shared:
        layout.shared["runs"] = find_runs(layout, batch)
    runs = layout.shared["runs"]
    output = flash_attn_varlen_func(
        query.flatten(0, 1)[runs.queries],
        key.flatten(0, 1)[runs.keys],
        value.flatten(0, 1)[runs.keys],
        cu_seqlens_q=runs.query_bounds,
        cu_seqlens_k=runs.key_bounds,
        max_seqlen_q=runs.most_queries,
        max_seqlen_k=runs.most_keys,
        **options,
    )
    padded = output.new_zeros(batch * num_queries, *output.shape[1:])
    return padded.index_copy(0, runs.queries, output).unflatten(0, (batch, num_queries))


def find_runs(layout: TokenLayout, batch: int) -> Runs:
    """Returns the runs of a batch of padded or packed sequences, with or without cached tokens."""
    device = layout.keys.device
    if layout.segments is not None:
        starts, ends = torch.tensor(layout.segments, device=device).T
        sizes = ends - starts
        bounds = _bounds(sizes)
        index = torch.arange(int(bounds[-1]), device=device) + torch.repeat_interleave(starts - bounds[:-1], sizes)
        longest = int(sizes.max())
        return Runs(index, index, bounds, bounds, longest, longest)

    position = layout.queries.expand(batch, -1)
    real = torch.ones_like(position, dtype=torch.bool) if layout.query_mask is None else layout.query_mask
    queries = real.flatten().nonzero()[:, 0]
    row, position = queries // real.shape[1], position.flatten()[queries]
    first = torch.zeros_like(position) if layout.first is None else layout.first.clamp(min=0).flatten()[queries]
    same = (torch.diff(row) == 0) & (torch.diff(first) == 0)
    last = torch.nn.functional.pad(~same, (0, 1), value=True)
    ends = last.nonzero()[:, 0] + 1

    keys = layout.keys.expand(batch, -1)[row[last]]
    seen = (keys >= first[last, None]) & (keys <= position[last, None])
    if layout.key_mask is not None:
        seen &= layout.key_mask[row[last]]
    run, slot = seen.nonzero().T
    query_sizes, key_sizes = torch.diff(ends, prepend=ends.new_zeros(1)), seen.sum(1)
    return Runs(
        queries,
        row[last][run] * keys.shape[1] + slot,
        _bounds(query_sizes),
        _bounds(key_sizes),
        int(query_sizes.max()),
        int(key_sizes.max()),
    )


def _bounds(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
