"""The matrix of queries times keys, cut into tiles: what is to be computed of it, and in which pieces.

A tile is some queries of some heads against some keys. With one of the two in reverse order its bias is a view of one
line (`alibi.bias_view`). Heads with a short window skip the keys beyond it, which makes them cost linear time.

A softmax needs all its keys at once: forward goes through blocks of queries and what they see. Gradients are sums over
queries and over keys: backward goes through blocks of keys and what sees them, and hides less that way.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from .alibi import bias_view

NEAR_BLOCK = 256  # queries in a tile: half of it is what it hides in vain
FULL_SPEED = 768  # queries from which on the kernels take more of them at once
FAR = 4096  # keys: for queries that see so much, full speed outweighs what is hidden in vain
KEY_BLOCK = 512  # keys in a tile of backward, which its kernel takes at once
MAX_BLOCKS = 8  # blocks in a tile: work for that many threads, in bounded memory
FEW_KEYS = 1024  # up to so many there is little to win by leaving some out
GRAIN = 128  # windows end at multiples of this, so that heads with similar ones share a tile


class Tile(NamedTuple):
    """Queries of some heads and keys that they need; or several blocks of one head, each some steps after the last.

    Attributes:
        heads: The query heads.
        kv_heads: Their key-value heads.
        queries: The queries of the first block.
        keys: The keys of the first block.
        blocks: Number of blocks.
        query_step: From the queries of a block to those of the next.
        key_step: From the keys of a block to those of the next.
    """

    heads: slice
    kv_heads: slice
    queries: slice
    keys: slice
    blocks: int = 1
    query_step: int = 0
    key_step: int = 0

    @property
    def is_of_one_head(self) -> bool:
        """Whether there is one query head."""
        return self.heads.stop - self.heads.start == 1

    @property
    def num_queries(self) -> int:
        """Queries in a block."""
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        """Keys in a block."""
        return self.keys.stop - self.keys.start

    def of_queries(self, states: Tensor) -> Tensor:
        """Views `[batch, heads, queries, ...]` as `[batch, heads or blocks, num_queries, ...]`."""
        return _cut(states[:, self.heads], self.queries, self.blocks, self.query_step)

    def of_keys(self, states: Tensor) -> Tensor:
        """Views `[batch, key_value_heads, keys, ...]` as `[batch, heads or blocks, num_keys, ...]`."""
        return _cut(states[:, self.kv_heads], self.keys, self.blocks, self.key_step)

    def bias(self, line: Tensor, corner: int) -> Tensor:
        """Views a line as the bias of the tile, `[1, heads or blocks, num_queries, num_keys]`, as `bias_view` does."""
        shift = self.query_step - self.key_step
        view = bias_view(line, self.heads, self.num_queries + (self.blocks - 1) * shift, self.num_keys, corner)
        return _cut(view, slice(0, self.num_queries), self.blocks, shift)

    def add_queries(self, into: Tensor, states: Tensor) -> None:
        """Adds states as `of_queries` cuts them to their place; those of blocks may overlap."""
        rows = self.queries
        for block, part in enumerate(states.chunk(self.blocks, dim=1)):
            step = block * self.query_step
            into[:, self.heads, rows.start + step : rows.stop + step] += part

    def put_keys(self, into: Tensor, states: Tensor) -> None:
        """Puts states as `of_keys` cuts them in their place; of blocks with the same keys, the sum."""
        if self.blocks > 1 and not self.key_step:
            into[:, self.kv_heads, self.keys] = states.sum(1, keepdim=True)
        else:
            self.of_keys(into).copy_(states)


def _cut(states: Tensor, rows: slice, blocks: int, step: int) -> Tensor:
    if blocks == 1:
        return states[:, :, rows]
    if not step:
        return states[:, :, rows].expand(-1, blocks, *(-1 for _ in states.shape[2:]))
    last = rows.stop + (blocks - 1) * step
    return states[:, 0, rows.start : last].unfold(1, rows.stop - rows.start, step).movedim(-1, 2)


def query_tiles(query: Tensor, key: Tensor, windows: Tensor | None) -> Iterator[Tile]:
    """Covers every query of every head once, in tiles of queries and all the keys that these see.

    Args:
        query: `[batch, heads, queries, head_dim]`, for its shape; the queries are the last of the keys.
        key: `[batch, key_value_heads, keys, head_dim]`, for its shape.
        windows: How far back each query head looks, `[heads]`; `None`: to the first key.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    past = num_keys - num_queries
    reach, size = _reach(query, key, windows), query.shape[1] // key.shape[1]
    for is_far, alike in groupby(range(len(reach)), key=lambda head: reach[head] >= FAR):
        block, members = FULL_SPEED if is_far else NEAR_BLOCK, list(alike)
        for start in range(0, num_queries, block):
            stop = min(start + block, num_queries)
            for first, group in groupby(members, key=lambda head: max(0, past + start - reach[head])):
                yield Tile(*_heads(group, size), slice(start, stop), slice(first, past + stop))


def key_tiles(query: Tensor, key: Tensor, windows: Tensor | None) -> Iterator[Tile]:
    """Covers every pair of a query and a key that it sees once, in tiles of keys and all the queries that see these.

    Arguments as in `query_tiles`.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    past = num_keys - num_queries
    reach, size = _reach(query, key, windows), query.shape[1] // key.shape[1]
    # The first may be shorter, so that what is left of the queries is whole blocks.
    for stop in range((num_keys - 1) % KEY_BLOCK + 1, num_keys + 1, KEY_BLOCK):
        start = max(0, stop - KEY_BLOCK)
        first = max(0, start - past)
        for last, group in groupby(range(len(reach)), key=lambda head: min(num_queries, stop - past + reach[head])):
            if first < last:  # else they lie further back than any query looks
                yield Tile(*_heads(group, size), slice(first, last), slice(start, stop))


def _heads(kv_heads: Iterable[int], size: int) -> tuple[slice, slice]:
    """Returns the query heads and the key-value heads of some of the latter that lie side by side."""
    first, *rest = kv_heads
    stop = first + 1 + len(rest)
    return slice(size * first, size * stop), slice(first, stop)


def _reach(query: Tensor, key: Tensor, windows: Tensor | None) -> list[int]:
    """Returns how far back the queries of each key-value head look, in whole grains."""
    kv_heads, num_keys = key.shape[1:3]
    if windows is None or num_keys <= FEW_KEYS:
        return [num_keys] * kv_heads
    furthest = windows.view(kv_heads, -1).amax(1).tolist()
    least = FULL_SPEED - KEY_BLOCK  # what a block of keys then has for queries, the kernel takes at full speed
    return [max(least, -(-window // GRAIN) * GRAIN) for window in furthest]


def joined(tiles: Iterable[Tile]) -> list[Tile]:
    """Makes blocks of the tiles of single heads, which windows make alike, for the kernel's threads to share."""
    result: list[Tile] = []
    latest: dict[tuple[int, int], int] = {}  # where the tile before it is that has the same heads
    for tile in tiles:
        heads = tile.heads.start, tile.heads.stop
        longer = _with_block(result[latest[heads]], tile) if heads in latest else None
        if longer is None:
            latest[heads] = len(result)
            result.append(tile)
        else:
            result[latest[heads]] = longer
    return result


def _with_block(tile: Tile, more: Tile) -> Tile | None:
    """Returns the tile with the other one as a further block, or `None` if it would not be like the others."""
    query_step = more.queries.start - tile.queries.start - (tile.blocks - 1) * tile.query_step
    key_step = more.keys.start - tile.keys.start - (tile.blocks - 1) * tile.key_step
    alike = (tile.heads, tile.num_queries, tile.num_keys) == (more.heads, more.num_queries, more.num_keys)
    in_line = query_step == key_step and (tile.blocks == 1 or query_step == tile.query_step)
    if not (tile.is_of_one_head and alike and in_line and tile.blocks < MAX_BLOCKS):
        return None
    return tile._replace(blocks=tile.blocks + 1, query_step=query_step, key_step=key_step)


def in_pieces(tile: Tile) -> Tile:
    """Makes blocks of the queries of a single head, for the same end, where many see the same keys."""
    if tile.is_of_one_head and tile.blocks == 1:
        size = tile.num_queries
        for blocks in range(MAX_BLOCKS, 1, -1):
            if size % blocks == 0 and size // blocks >= FULL_SPEED:
                queries = slice(tile.queries.start, tile.queries.start + size // blocks)
                return tile._replace(queries=queries, blocks=blocks, query_step=size // blocks)
    return tile
