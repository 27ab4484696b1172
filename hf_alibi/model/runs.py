"""Runs: stretches of queries that are the last of the keys that they see, each a causal text by itself.

Kernels know whole causal sequences, and neither padding nor documents. A batch that is cut into runs needs no mask.
Within a run a distance is a difference of indices, because the keys of a run are exactly its visible tokens.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Runs(NamedTuple):
    """The runs of a batch, in ascending order of their queries. Two runs may share keys.

    Attributes:
        queries: `[all queries of the runs]`, indices into the flattened batch `[batch * queries]`; `None`: all of it,
            in order.
        keys: `[all keys of the runs]`, indices into `[batch * keys]`; `None`: as for `queries`.
        query_bounds: `[runs + 1]`, int32, where the runs begin and end in `queries`.
        key_bounds: `[runs + 1]`, int32, where they begin and end in `keys`.
        query_sizes: Number of queries in each run.
        key_sizes: Number of keys in each run.
    """

    queries: Tensor | None
    keys: Tensor | None
    query_bounds: Tensor
    key_bounds: Tensor
    query_sizes: list[int]
    key_sizes: list[int]

    def to(self, device: Any, **kwargs: Any) -> "Runs":
        """Returns a copy on another device."""
        moved: dict[str, Any] = {
            name: x.to(device, **kwargs) for name, x in self._asdict().items() if isinstance(x, Tensor)
        }
        return self._replace(**moved)


def runs_of_bounds(query_bounds: Tensor, key_bounds: Tensor, num_queries: int, num_keys: int) -> Runs:
    """Returns the runs of sequences that follow each other from the first query and the first key on.

    Args:
        query_bounds: `[sequences + 1]`, where the sequences begin and end among the queries. Those without any
            query are left out, and so are the queries after the last bound.
        key_bounds: `[sequences + 1]`, the same among the keys.
        num_queries: Queries in the batch.
        num_keys: Keys in the batch.
    """
    query_sizes, key_sizes = query_bounds.diff(), key_bounds.diff()
    has_queries = query_sizes > 0
    query_sizes, key_sizes = query_sizes[has_queries], key_sizes[has_queries]
    keys = ranges(key_bounds[:-1][has_queries], key_sizes)
    return _runs(
        torch.arange(int(query_sizes.sum()), device=keys.device), keys, query_sizes, key_sizes, num_queries, num_keys
    )


def find_runs(
    queries: Tensor,
    first: Tensor,
    query_mask: Tensor,
    key_mask: Tensor | None,
    num_keys: int,
    most_keys: int | None = None,
) -> Runs | None:
    """Returns the runs of a batch of padded or packed sequences, with or without cached tokens.

    Args:
        queries: `[batch, queries]`, positions.
        first: `[batch, queries]`, the position where the document of a query begins.
        query_mask: `[batch, queries]`, False where a query belongs to no run.
        key_mask: `[batch, keys]`, False at padding; `None`: no padding.
        num_keys: Keys in a row of the batch.
        most_keys: How many keys all runs may have together. Padding within a text makes runs that share keys.

    Returns:
        The runs, or `None` if they would have more keys than `most_keys`.
    """
    index = query_mask.flatten().nonzero()[:, 0]
    row, position, first = index // queries.shape[1], queries.flatten()[index], first.flatten()[index]
    goes_on = (row.diff() == 0) & (first.diff() == 0) & (position.diff() == 1)
    is_last = F.pad(~goes_on, (0, 1), value=True)[: len(index)]
    query_sizes = F.pad(is_last.nonzero()[:, 0] + 1, (1, 0)).diff()
    row, position, first = row[is_last], position[is_last], first[is_last]
    key_sizes = position - first + 1
    if most_keys is not None and int(key_sizes.sum()) > most_keys:
        return None
    if key_mask is None:
        keys = ranges(row * num_keys + first, key_sizes)
    else:
        rows_before = F.pad(key_mask.sum(1).cumsum(0), (1, 0))
        keys = key_mask.flatten().nonzero()[:, 0][ranges(rows_before[row] + first, key_sizes)]
    return _runs(index, keys, query_sizes, key_sizes, queries.numel(), len(queries) * num_keys)


def ranges(starts: Tensor, sizes: Tensor) -> Tensor:
    """Returns the numbers `start, start + 1, ...` of all ranges one after another, `[sum of sizes]`."""
    before = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum()), device=sizes.device) + torch.repeat_interleave(starts - before, sizes)


def _runs(
    queries: Tensor, keys: Tensor, query_sizes: Tensor, key_sizes: Tensor, num_queries: int, num_keys: int
) -> Runs:
    return Runs(
        _unless_all(queries, num_queries),
        _unless_all(keys, num_keys),
        _bounds(query_sizes),
        _bounds(key_sizes),
        query_sizes.tolist(),
        key_sizes.tolist(),
    )


def _bounds(sizes: Tensor) -> Tensor:
    return F.pad(sizes.cumsum(0), (1, 0)).int()


def _unless_all(index: Tensor, size: int) -> Tensor | None:
    is_all = len(index) == size and torch.equal(index, torch.arange(size, device=index.device))
    return None if is_all else index
