"""Causal ALiBi attention in tiles: exact, in linear memory, and only where a head has something to see.

A tile is a block of queries of some heads against the keys that these can see. Its bias is a view of one
line (`alibi.bias_view`), and a kernel of PyTorch's does the rest. Heads with a short window skip the keys
beyond it, which makes them cost linear time.

The kernels of PyTorch know no window, no bias in a line and no offset into a cache; going through them
tile by tile needs none of that, forward or backward.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .alibi import bias_view, causal_line

QUERY_BLOCK = 512  # below twice this many tokens there is little to win by leaving out keys
MAX_BLOCKS = 8  # blocks in a tile: work for that many threads, in bounded memory
FORWARD_SHARE = 1 / 16  # of a block's queries in its keys: forward sees the half-hidden ones as a whole
BACKWARD_SHARE = 1 / 2
KEY_GRAIN = 128  # windows start at multiples of this, so that heads with similar ones share a tile


class Tile(NamedTuple):
    """A block of queries of some heads and the keys they need; or several blocks of one head, each with its own keys.

    Attributes:
        heads: The query heads.
        kv_heads: Their key-value heads.
        queries: The queries of all blocks.
        keys: The keys of all blocks; those of a block start a block's queries after those of the block before.
        blocks: Number of blocks.
        is_square: Whether a block's keys are those of its queries, and the kernel is to skip those that are hidden.
    """

    heads: slice
    kv_heads: slice
    queries: slice
    keys: slice
    blocks: int = 1
    is_square: bool = False

    @property
    def num_queries(self) -> int:
        """Queries in a block."""
        return (self.queries.stop - self.queries.start) // self.blocks

    @property
    def num_keys(self) -> int:
        """Keys that a block sees."""
        return self.keys.stop - self.keys.start - (self.blocks - 1) * self.num_queries

    def parts(self) -> Iterator["Tile"]:
        """Cuts the keys: those before a block's queries, which all of these may see, and squares of the others."""
        if self.is_square:
            yield self
            return
        first_hidden = self.keys.stop - self.num_queries
        if self.num_keys > self.num_queries:
            yield self._replace(keys=slice(self.keys.start, first_hidden))
        if self.blocks == 1 and self.num_queries > QUERY_BLOCK:  # a square's bias is stored: keep it small
            middle = self.queries.start + QUERY_BLOCK
            upper = slice(first_hidden, first_hidden + QUERY_BLOCK), slice(self.queries.start, middle)
            lower = slice(first_hidden, self.keys.stop), slice(middle, self.queries.stop)
            for keys, queries in (upper, lower):
                yield from self._replace(keys=keys, queries=queries).parts()
        else:
            start = self.keys.start + self.num_keys - self.num_queries
            yield self._replace(keys=slice(start, self.keys.stop), is_square=True)

    def of_queries(self, states: Tensor) -> Tensor:
        """Cuts `[batch, heads, queries, ...]` to `[batch, heads or blocks, block, ...]`, as `tile_biases` needs it."""
        states = states[:, self.heads, self.queries]
        if self.blocks > 1:
            states = states[:, 0].unflatten(1, (self.blocks, -1))
        return states if self.is_square else states.flip(2)

    def of_keys(self, states: Tensor) -> Tensor:
        """Views `[batch, key_value_heads, keys, head_dim]` as `[batch, heads or blocks, num_keys, head_dim]`."""
        states = states[:, self.kv_heads, self.keys]
        if self.blocks > 1:
            states = states[:, 0].unfold(1, self.num_keys, self.num_queries).mT
        return states

    def at_queries(self, into: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the place in `into` of what `of_queries` cuts, and such states as they fit there."""
        place = into[:, self.heads, self.queries]
        return place, (states if self.is_square else states.flip(2)).reshape(place.shape)

    def add_keys(self, into: Tensor, states: Tensor) -> None:
        """Adds states as `of_keys` cuts them to their place; those of blocks overlap."""
        place = into[:, self.kv_heads, self.keys]
        if self.blocks == 1:
            place += states
            return
        for block in range(self.blocks):
            place[:, 0, block * self.num_queries :][:, : self.num_keys] += states[:, block]


def tiles(query: Tensor, key: Tensor, windows: list[int] | None, share: float) -> Iterator[Tile]:
    """Covers every query of every head once; the queries are the last of the keys.

    Args:
        query: `[batch, heads, queries, head_dim]`, for its shape.
        key: `[batch, key_value_heads, keys, head_dim]`, for its shape.
        windows: How far back each query head looks; `None`: to the first key.
        share: Which part of the keys the queries of a block should be at most.
    """
    heads, num_queries = query.shape[1:3]
    kv_heads, num_keys = key.shape[1:3]
    size = heads // kv_heads
    past = num_keys - num_queries
    reach = [num_keys] * kv_heads
    if windows is not None:
        reach = [max(windows[size * head : size * (head + 1)]) for head in range(kv_heads)]
    for block, alike in groupby(range(kv_heads), key=lambda head: block_size(reach[head], share * num_keys)):
        members = list(alike)
        for start in range(0, num_queries, block):
            end = min(start + block, num_queries)
            for first, group in groupby(members, key=lambda head: max(0, past + start - reach[head]) // KEY_GRAIN):
                begin, *rest = group
                kv = slice(begin, begin + 1 + len(rest))
                q, keys = slice(start, end), slice(first * KEY_GRAIN, past + end)
                yield Tile(slice(size * kv.start, size * kv.stop), kv, q, keys, is_square=end == num_keys <= block)


def block_size(reach: int, most: float) -> int:
    """Returns how many queries go into a block; kernels have two speeds, and change to the higher one above 767."""
    if reach <= 2 * QUERY_BLOCK:
        return QUERY_BLOCK // 2
    return QUERY_BLOCK if most < 2 * QUERY_BLOCK else 2 * QUERY_BLOCK


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
        and tile.keys.start == last.keys.start + last.blocks * last.num_queries
        and (tile.num_queries, tile.num_keys) == (last.num_queries, last.num_keys)
        and last.blocks < MAX_BLOCKS
    )


def tile_biases(line: Tensor, num_queries: int) -> Callable[[Tile], Tensor]:
    """Returns a function that gives the bias of a tile, the same for all its blocks, `[1, heads, queries, keys]`.

    It is a view with the queries in reverse order. But their order is kept in a square tile, of which kernels know
    to skip the half that lies in the future; those of the same heads share one stored bias.

    Args:
        line: As `causal_line` returns it.
        num_queries: All queries, of which the last ones see the last keys.
    """
    squares: dict[tuple[int, int, int], Tensor] = {}

    def bias(tile: Tile) -> Tensor:
        key = tile.heads.start, tile.heads.stop, tile.num_queries
        if key in squares and tile.is_square:
            return squares[key]
        corner = num_queries - tile.queries.start - tile.num_queries + tile.keys.start
        view = bias_view(line, tile.heads, tile.num_queries, tile.num_keys, corner)
        return squares.setdefault(key, view.flip(2)) if tile.is_square else view

    return bias


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
    line = causal_line(slopes, behind=num_keys - 1, ahead=min(2 * QUERY_BLOCK, query.shape[2]) - 1)
    if query.device.type == "cpu" and not dropout:
        if slopes.requires_grad:
            query, key, value = _with_slope_column(query, key, value, slopes, scaling)
        query, key, value = (_with_dense_rows(states) for states in (query, key, value))
        return _TiledAttention.apply(query, key, value, line.detach(), scaling, windows)[..., :head_dim]
    outputs, bias = [], tile_biases(line, query.shape[2])
    for tile in tiles(query, key, None, FORWARD_SHARE):  # of all heads at once
        q, k, v = tile.of_queries(query), tile.of_keys(key), tile.of_keys(value)
        part = kernel(q, k, v, bias(tile), scaling, dropout)
        outputs.append(part if tile.is_square else part.flip(2))
    return torch.cat(outputs, dim=2)


def attention_in_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    scaling: float,
    dropout: float,
    windows: list[int] | None,
    runs: list[tuple[slice, slice]],
) -> Tensor:
    """Runs of tokens attend each by itself, as if it were alone; arguments and result as in `causal_attention`.

    Args:
        runs: The queries of each run, which are the last of its keys, and the keys; queries in ascending order.
            Those outside are padding and get zeros.
    """
    batch, heads, num_queries, head_dim = query.shape
    pieces, done = [], 0
    for queries, keys in runs:
        q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        run = causal_attention(q, k, v, slopes, scaling, dropout, windows)
        pieces += [query.new_zeros(batch, heads, queries.start - done, head_dim), run]
        done = queries.stop
    pieces.append(query.new_zeros(batch, heads, num_queries - done, head_dim))
    return torch.cat(pieces, dim=2)


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

    Autograd by itself would hold a padded copy of all keys' gradients for every tile. And gradients, unlike a
    softmax, are sums over keys: backward goes through those that all queries of a block see, and then through those
    of which half are hidden.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, line: Tensor, scaling: float, windows: list[int] | None
    ) -> Tensor:
        batch, heads, num_queries, head_dim = query.shape
        output = query.new_empty(batch, num_queries, heads, head_dim).transpose(1, 2)
        logsumexp = line.new_empty(batch, heads, num_queries)
        bias = tile_biases(line, num_queries)
        for tile in merged(tiles(query, key, windows, FORWARD_SHARE)):
            q, k, v = tile.of_queries(query), tile.of_keys(key), tile.of_keys(value)
            mask = bias(tile).expand(batch, q.shape[1], -1, -1)
            results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, is_causal=tile.is_square, attn_mask=mask, scale=scaling
            )
            for into, result in zip((output, logsumexp), results, strict=True):
                place, states = tile.at_queries(into, result)
                place.copy_(states)
        ctx.save_for_backward(query, key, value, line, output, logsumexp)
        ctx.scaling, ctx.windows = scaling, windows
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, line, output, logsumexp = ctx.saved_tensors
        grad_output = _with_dense_rows(grad_output)
        grads = [torch.zeros_like(states, dtype=line.dtype) for states in (query, key, value)]
        bias = tile_biases(line, query.shape[2])
        plan = merged(tiles(query, key, ctx.windows, BACKWARD_SHARE))
        for tile in chain.from_iterable(whole.parts() for whole in plan):
            q = tile.of_queries(query)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                tile.of_queries(grad_output),
                q,
                tile.of_keys(key),
                tile.of_keys(value),
                tile.of_queries(output),
                tile.of_queries(logsumexp),
                0.0,
                tile.is_square,
                attn_mask=bias(tile).expand(len(query), q.shape[1], -1, -1),
                scale=ctx.scaling,
            )
            place, states = tile.at_queries(grads[0], dq)
            place += states
            tile.add_keys(grads[1], dk)
            tile.add_keys(grads[2], dv)
        return *(grad.to(query.dtype) for grad in grads), None, None, None
