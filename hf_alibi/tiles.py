"""Causal ALiBi attention in tiles: exact, in linear memory, and only where a head has something to see.

A tile is a block of queries of some heads against the keys that these can see. Its bias is a view of one
line (`alibi.bias_view`), and a kernel of PyTorch's does the rest. Heads with a short window skip the keys
beyond it, which makes them cost linear time.

The kernels of PyTorch know no window, no bias in a line and no offset into a cache; going through them
tile by tile needs none of that, forward or backward.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .alibi import bias_view, causal_line

QUERY_BLOCK = 512  # queries in a tile: enough to fill a kernel, few enough that its half-hidden keys cost little
MAX_BLOCKS = 8  # blocks in a tile: work for that many threads, in bounded memory
KEY_GRAIN = 128  # windows start at multiples of this, so that heads with similar ones share a tile


class Tile(NamedTuple):
    """A block of queries of some heads and the keys they need; or several blocks of one head, each with its own keys.

    Attributes:
        heads: The query heads.
        kv_heads: Their key-value heads.
        queries: The queries of all blocks.
        keys: The keys of all blocks; those of a block start `QUERY_BLOCK` after those of the block before.
        blocks: Number of blocks.
    """

    heads: slice
    kv_heads: slice
    queries: slice
    keys: slice
    blocks: int = 1

    @property
    def num_queries(self) -> int:
        """Queries in a block."""
        return (self.queries.stop - self.queries.start) // self.blocks

    @property
    def num_keys(self) -> int:
        """Keys that a block sees."""
        return self.keys.stop - self.keys.start - (self.blocks - 1) * QUERY_BLOCK

    def of_queries(self, states: Tensor) -> Tensor:
        """Cuts `[batch, heads, queries, ...]` to `[batch, heads or blocks, block, ...]`, queries in reverse order."""
        states = states[:, self.heads, self.queries]
        if self.blocks > 1:
            states = states[:, 0].unflatten(1, (self.blocks, -1))
        return states.flip(2)

    def of_keys(self, states: Tensor) -> Tensor:
        """Views `[batch, key_value_heads, keys, head_dim]` as `[batch, heads or blocks, num_keys, head_dim]`."""
        states = states[:, self.kv_heads, self.keys]
        if self.blocks > 1:
            states = states[:, 0].unfold(1, self.num_keys, QUERY_BLOCK).mT
        return states

    def put_queries(self, into: Tensor, states: Tensor) -> None:
        """Undoes `of_queries`: writes `states` to their place."""
        place = into[:, self.heads, self.queries]
        place.copy_(states.flip(2).reshape(place.shape))

    def add_keys(self, into: Tensor, states: Tensor) -> None:
        """Adds states as `of_keys` cuts them to their place; those of blocks overlap."""
        place = into[:, self.kv_heads, self.keys]
        if self.blocks == 1:
            place += states
            return
        for block in range(self.blocks):
            place[:, 0, block * QUERY_BLOCK :][:, : self.num_keys] += states[:, block]


def tiles(query: Tensor, key: Tensor, windows: list[int] | None) -> Iterator[Tile]:
    """Covers every query of every head once; the queries are the last of the keys.

    Args:
        query: `[batch, heads, queries, head_dim]`, for its shape.
        key: `[batch, key_value_heads, keys, head_dim]`, for its shape.
        windows: How far back each query head looks; `None`: to the first key.
    """
    heads, num_queries = query.shape[1:3]
    kv_heads, num_keys = key.shape[1:3]
    size = heads // kv_heads
    past = num_keys - num_queries
    reach = [num_keys] * kv_heads
    if windows is not None:
        reach = [max(windows[size * head : size * (head + 1)]) for head in range(kv_heads)]
    for start in range(0, num_queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, num_queries)
        first = [max(0, past + start - window) // KEY_GRAIN * KEY_GRAIN for window in reach]
        for first_key, group in groupby(range(kv_heads), key=first.__getitem__):
            begin, *_ = members = list(group)
            kv = slice(begin, begin + len(members))
            yield Tile(slice(size * kv.start, size * kv.stop), kv, slice(start, end), slice(first_key, past + end))


def merged(parts: Iterable[Tile]) -> list[Tile]:
    """Joins the blocks of single heads, whose windows make them alike, so that the kernel's threads can share them."""
    joined: list[Tile] = []
    for tile in sorted(parts, key=lambda tile: (tile.heads.start, tile.heads.stop, tile.queries.start)):
        if joined and _continues(joined[-1], tile):
            last = joined.pop()
            queries, keys = slice(last.queries.start, tile.queries.stop), slice(last.keys.start, tile.keys.stop)
            tile = Tile(tile.heads, tile.kv_heads, queries, keys, last.blocks + 1)
        joined.append(tile)
    return joined


def _continues(last: Tile, tile: Tile) -> bool:
    return (
        last.heads == tile.heads
        and tile.heads.stop - tile.heads.start == 1
        and tile.queries.start == last.queries.stop
        and tile.keys.start == last.keys.start + last.blocks * QUERY_BLOCK
        and (tile.num_queries, tile.num_keys) == (last.num_queries, last.num_keys)
        and last.blocks < MAX_BLOCKS
    )


def tile_bias(line: Tensor, tile: Tile, num_keys: int) -> Tensor:
    """Returns the bias of a tile with its queries in reverse order, `[1, heads, queries, keys]`, as a view."""
    corner = num_keys - (tile.keys.stop - tile.keys.start) + (tile.blocks - 1) * QUERY_BLOCK
    return bias_view(line, tile.heads, tile.num_queries, tile.num_keys, corner)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scaling: float,
    dropout: float,
    windows: list[int] | None,
) -> Tensor:
    """Attention of queries that are the last of the keys, nothing but the future being hidden.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_value_heads, keys, head_dim]`.
        value: `[batch, key_value_heads, keys, head_dim]`.
        slopes: `[heads]`.
        scaling: Factor of the scores before the bias is added.
        dropout: Probability of dropping an attention weight.
        windows: How far back each query head looks; `None`: to the first key.

    Returns:
        `[batch, heads, queries, head_dim]`.
    """
    num_keys, head_dim = key.shape[2:]
    line = causal_line(slopes, behind=num_keys - 1, ahead=min(QUERY_BLOCK, query.shape[2]) - 1)
    if query.device.type == "cpu" and not dropout:
        if slopes.requires_grad:
            query, key, value = _with_slope_column(query, key, value, slopes, scaling)
        query, key, value = (_with_dense_rows(states) for states in (query, key, value))
        plan = merged(tiles(query, key, windows))
        return _TiledAttention.apply(query, key, value, line.detach(), scaling, plan)[..., :head_dim]
    outputs = []
    for tile in tiles(query, key, windows=None):  # of all heads at once
        q, k, v = tile.of_queries(query), tile.of_keys(key), tile.of_keys(value)
        outputs.append(kernel(q, k, v, tile_bias(line, tile, num_keys), scaling, dropout).flip(2))
    return torch.cat(outputs, dim=2)


def kernel(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float, dropout: float) -> Tensor:
    """PyTorch's attention with a bias `[batch or 1, heads, queries, keys]`, of higher precision where it can be."""
    if query.device.type != "cpu":
        # Only the CPU's kernels read a bias of overlapping strides and of another dtype than the queries'.
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


def _with_slope_column(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a column that changes no score and yet carries the gradient of trainable slopes.

    The bias m (j - i) has the derivative j - i in m, and what is constant in a row, such as i, is without
    effect on a softmax. A column of exact zeros in the queries, whose derivative in m is 1, against the
    positions j in the keys gives that; the kernel's gradient for queries does the sum.
    """
    zero = (slopes - slopes.detach())[None, :, None, None].to(query.dtype) / scaling
    positions = torch.arange(1 - key.shape[2], 1, device=key.device, dtype=key.dtype)[:, None]
    columns = zero.expand(*query.shape[:3], 1), positions.expand(*key.shape[:3], 1), value[..., :1] * 0
    query, key, value = (torch.cat(pair, -1) for pair in zip((query, key, value), columns, strict=True))
    return query, key, value


def _with_dense_rows(states: Tensor) -> Tensor:
    """The kernel called below reads the last dimension at stride 1, and does not check."""
    return states if states.stride(-1) == 1 else states.contiguous()


class _TiledAttention(torch.autograd.Function):
    """The tiles through the CPU's flash kernel, with gradients summed in place.

    Autograd by itself would hold a padded copy of all keys' gradients for every tile.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, line: Tensor, scaling: float, plan: list[Tile]
    ) -> Tensor:
        batch, heads, num_queries, head_dim = query.shape
        output = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
        logsumexp = line.new_empty(batch, heads, num_queries)
        for tile in plan:
            q, k, v = tile.of_queries(query), tile.of_keys(key), tile.of_keys(value)
            bias = tile_bias(line, tile, key.shape[2]).expand(batch, q.shape[1], -1, -1)
            reverse, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, attn_mask=bias, scale=scaling
            )
            tile.put_queries(output, reverse)
            tile.put_queries(logsumexp, sums)
        ctx.save_for_backward(query, key, value, line, output, logsumexp)
        ctx.scaling, ctx.plan = scaling, plan
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, line, output, logsumexp = ctx.saved_tensors
        grad_output = _with_dense_rows(grad_output)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(states, dtype=line.dtype) for states in (key, value))
        for tile in ctx.plan:
            q = tile.of_queries(query)
            bias = tile_bias(line, tile, key.shape[2]).expand(len(query), q.shape[1], -1, -1)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                tile.of_queries(grad_output),
                q,
                tile.of_keys(key),
                tile.of_keys(value),
                tile.of_queries(output),
                tile.of_queries(logsumexp),
                0.0,
                False,
                attn_mask=bias,
                scale=ctx.scaling,
            )
            tile.put_queries(grad_query, dq)
            tile.add_keys(grad_key, dk)
            tile.add_keys(grad_value, dv)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None
