"""Tiles: which parts of the matrix of queries times keys are computed, and in which pieces.

A tile is a range of queries against a range of keys, for some heads. If the queries or the keys are in reverse order,
the bias of a tile is a view of one line (`alibi.bias_view`). Heads with a short window skip the keys beyond it, so
their cost is linear in the length.

The forward pass goes through blocks of queries, each with all keys that it sees, because a softmax needs all its keys
at once. The backward pass goes through blocks of keys, each with all queries that see it. Gradients are sums, so it
is free to do so, and fewer of the computed scores are masked out.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from .alibi import bias_view

# These constants trade speed and memory; they change results only by rounding. They suit PyTorch 2.13 on 2 CPU cores
# (AMD EPYC), measured with `hf_alibi benchmark attention --backends sdpa`.

# Queries per forward tile of a head with a short reach. Each tile computes about half a block of future keys per query
# for nothing. A smaller block wastes less, but needs more kernel calls.
NEAR_BLOCK = 256
# Queries per forward tile of a head with a long reach. From this number on, the CPU kernel takes larger blocks of
# queries at once, which is faster per score.
FULL_SPEED = 768
# Reach in keys from which a forward tile has FULL_SPEED queries. The faster kernel then outweighs the additional
# future keys that are computed for nothing.
FAR = 4096
# Keys per backward tile: as many as the CPU kernel takes at once. A larger block computes more masked scores, a
# smaller one does not fill the kernel's block.
KEY_BLOCK = 512
# Blocks per tile. The threads of the kernel share the blocks: fewer leave threads idle, more take more memory.
MAX_BLOCKS = 8
# Keys up to which windows are ignored. Skipping keys saves little there, and finding the windows costs time.
FEW_KEYS = 1024
# Keys beyond their windows, times queries, up to which heads share a forward tile or a ring of the windowed cache. A
# larger number reads more keys for nothing, a smaller one needs more kernel calls per token. Measured with
# `hf_alibi benchmark generation`.
SHARED_KEYS = 2048
# Queries per kernel call where the bias is stored. More queries take more memory, fewer need more kernel calls. From
# this number of queries on, runs and the norms of all keys are worth their cost.
QUERY_BLOCK = 512
# Numbers in the bias of a pass up to which a GPU stores it once for all layers: 256 MiB in 16 bits. A larger number
# needs more memory, a smaller one needs more kernel calls in each layer.
STORED_BIAS = 2**27
# Numbers in a bias that is stored for one kernel call: 512 MiB in 16 bits. Kernels for GPUs fail at 2^31.
CALL_BIAS = 2**28
# Windows are rounded up to a multiple of this number of keys. A coarser grain computes more keys than needed, but lets
# more heads share a tile.
GRAIN = 128


class Tile(NamedTuple):
    """One block of queries and keys for some heads, or several blocks of equal size for one head.

    Attributes:
        heads: The query heads.
        kv_heads: The key-value heads of these query heads.
        queries: The queries of the first block.
        keys: The keys of the first block.
        blocks: Number of blocks.
        query_step: Offset from the queries of one block to the queries of the next.
        key_step: Offset from the keys of one block to the keys of the next.
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
        """Whether the tile has a single query head."""
        return self.heads.stop - self.heads.start == 1

    @property
    def num_queries(self) -> int:
        """Number of queries in a block."""
        return self.queries.stop - self.queries.start

    @property
    def num_keys(self) -> int:
        """Number of keys in a block."""
        return self.keys.stop - self.keys.start

    def of_queries(self, states: Tensor) -> Tensor:
        """Returns a view `[batch, heads or blocks, num_queries, ...]` of states `[batch, heads, queries, ...]`."""
        return _cut(states[:, self.heads], self.queries, self.blocks, self.query_step)

    def of_keys(self, states: Tensor) -> Tensor:
        """Returns a view `[batch, heads or blocks, num_keys, ...]` of states `[batch, key_value_heads, keys, ...]`."""
        return _cut(states[:, self.kv_heads], self.keys, self.blocks, self.key_step)

    def bias(self, line: Tensor, corner: int) -> Tensor:
        """Returns the bias of the tile, `[1, heads or blocks, num_queries, num_keys]`, as a view like `bias_view`."""
        shift = self.query_step - self.key_step
        view = bias_view(line, self.heads, self.num_queries + (self.blocks - 1) * shift, self.num_keys, corner)
        return _cut(view, slice(0, self.num_queries), self.blocks, shift)

    def add_queries(self, into: Tensor, states: Tensor) -> None:
        """Adds states, cut as `of_queries` cuts them, to their rows of `into`. Blocks may overlap."""
        rows = self.queries
        for block, part in enumerate(states.chunk(self.blocks, dim=1)):
            step = block * self.query_step
            into[:, self.heads, rows.start + step : rows.stop + step] += part

    def put_keys(self, into: Tensor, states: Tensor) -> None:
        """Writes states, cut as `of_keys` cuts them, to their rows of `into`. Blocks with equal keys are summed."""
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


def stored_queries(query: Tensor, key: Tensor, texts: int = 1) -> int:
    """Returns for how many queries the bias of all heads can be stored for one kernel call.

    Args:
        query: `[batch, heads, queries, head_dim]`. Only the shape is used.
        key: `[batch, key_value_heads, keys, head_dim]`. Only the shape is used.
        texts: Texts that have a bias of their own.
    """
    return max(1, CALL_BIAS // (texts * query.shape[1] * key.shape[2]))


def query_tiles(query: Tensor, key: Tensor, windows: Tensor | None, most: int = FULL_SPEED) -> Iterator[Tile]:
    """Yields tiles that contain every query of every head once, with all keys that it sees.

    Args:
        query: `[batch, heads, queries, head_dim]`. Only the shape is used. The queries belong to the last keys.
        key: `[batch, key_value_heads, keys, head_dim]`. Only the shape is used.
        windows: `[heads]`, the distance that each query head sees; `None` for no limit.
        most: Queries that a tile may have.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    past = num_keys - num_queries
    reach, size = _reach(query, key, windows), query.shape[1] // key.shape[1]
    for is_far, alike in groupby(range(len(reach)), key=lambda head: reach[head] >= FAR):
        block, members = min(most, FULL_SPEED if is_far else NEAR_BLOCK), list(alike)
        for start in range(0, num_queries, block):
            stop = min(start + block, num_queries)
            seen = [min(reach[head], past + start) for head in members]
            for group in neighbours(seen, stop - start):
                keys = slice(past + start - max(seen[group]), past + stop)
                yield Tile(*_heads(members[group], size), slice(start, stop), keys)


def key_tiles(query: Tensor, key: Tensor, windows: Tensor | None) -> Iterator[Tile]:
    """Yields tiles that contain every visible pair of a query and a key once: blocks of keys, with all their queries.

    The arguments are those of `query_tiles`.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    past = num_keys - num_queries
    reach, size = _reach(query, key, windows), query.shape[1] // key.shape[1]
    # The first block may be shorter than the others. The number of remaining queries is then a multiple of KEY_BLOCK.
    for stop in range((num_keys - 1) % KEY_BLOCK + 1, num_keys + 1, KEY_BLOCK):
        start = max(0, stop - KEY_BLOCK)
        first = max(0, start - past)
        for last, group in groupby(range(len(reach)), key=lambda head: min(num_queries, stop - past + reach[head])):
            # Otherwise no query sees these keys.
            if first < last:
                yield Tile(*_heads(group, size), slice(first, last), slice(start, stop))


def neighbours(windows: Sequence[int], num_queries: int = 1) -> list[slice]:
    """Groups consecutive heads, so that all of a group can look as far as its largest window at little cost.

    Args:
        windows: The distance that each key-value head sees.
        num_queries: Number of queries of each head.
    """
    most = SHARED_KEYS // num_queries
    groups: list[slice] = []
    for head in range(len(windows)):
        group = windows[groups[-1].start : head + 1] if groups else []
        if group and max(group) * len(group) - sum(group) <= most:
            groups[-1] = slice(groups[-1].start, head + 1)
        else:
            groups.append(slice(head, head + 1))
    return groups


def _heads(kv_heads: Iterable[int], size: int) -> tuple[slice, slice]:
    """Returns the query heads and the key-value heads, as slices, for consecutive key-value heads."""
    first, *rest = kv_heads
    stop = first + 1 + len(rest)
    return slice(size * first, size * stop), slice(first, stop)


def _reach(query: Tensor, key: Tensor, windows: Tensor | None) -> list[int]:
    """Returns for each key-value head the distance that its queries see, rounded up to a multiple of `GRAIN`."""
    kv_heads, num_keys = key.shape[1:3]
    if windows is None or num_keys <= FEW_KEYS:
        return [num_keys] * kv_heads
    furthest = windows.view(kv_heads, -1).amax(1).tolist()
    # Large enough that every block of keys meets FULL_SPEED queries, except at the end of the text.
    least = FULL_SPEED - KEY_BLOCK
    return [max(least, -(-window // GRAIN) * GRAIN) for window in furthest]


def joined(tiles: Iterable[Tile]) -> list[Tile]:
    """Joins tiles of the same single head into tiles of several blocks, so that the kernel's threads share the work.

    With windows, most tiles of a head have equal sizes and equal steps, which makes this possible.
    """
    result: list[Tile] = []
    # By heads: the index in `result` of their latest tile.
    latest: dict[tuple[int, int], int] = {}
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
    """Returns `tile` with `more` as a further block, or `None` if size or step differ from those of its blocks."""
    query_step = more.queries.start - tile.queries.start - (tile.blocks - 1) * tile.query_step
    key_step = more.keys.start - tile.keys.start - (tile.blocks - 1) * tile.key_step
    alike = (tile.heads, tile.num_queries, tile.num_keys) == (more.heads, more.num_queries, more.num_keys)
    in_line = query_step == key_step and (tile.blocks == 1 or query_step == tile.query_step)
    if not (tile.is_of_one_head and alike and in_line and tile.blocks < MAX_BLOCKS):
        return None
    return tile._replace(blocks=tile.blocks + 1, query_step=query_step, key_step=key_step)


def in_pieces(tile: Tile) -> Tile:
    """Splits a tile of one head and many queries into blocks with equal keys, so that threads share the work."""
    if tile.is_of_one_head and tile.blocks == 1:
        size = tile.num_queries
        for blocks in range(MAX_BLOCKS, 1, -1):
            if size % blocks == 0 and size // blocks >= FULL_SPEED:
                queries = slice(tile.queries.start, tile.queries.start + size // blocks)
                return tile._replace(queries=queries, blocks=blocks, query_step=size // blocks)
    return tile
