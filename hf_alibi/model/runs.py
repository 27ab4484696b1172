"""Runs: parts of a batch that are plain causal sequences, so that kernels without masks can compute them.

A run is a range of consecutive queries and all keys that they see. The queries belong to the last of these keys.
Padding and keys of other documents are not in the run, so within it a distance is a difference of indices.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Runs(NamedTuple):
    """The runs of a batch, in ascending order of their queries. Two runs may share keys.

    Attributes:
        queries: `[queries of all runs]`, indices into the flattened batch `[batch * queries]`; `None` for the whole
            batch in order.
        keys: `[keys of all runs]`, indices into the flattened batch `[batch * keys]`; `None` for the whole batch in
            order.
        query_bounds: `[runs + 1]`, int32, the bounds of the runs in `queries`.
        key_bounds: `[runs + 1]`, int32, the bounds of the runs in `keys`.
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
    """Returns the runs of consecutive sequences, given their bounds.

    Args:
        query_bounds: `[sequences + 1]`, the bounds of the sequences among the queries. Sequences without queries give
            no run, and queries after the last bound are in no run.
        key_bounds: `[sequences + 1]`, the bounds of the sequences among the keys.
        num_queries: Number of queries in the batch.
        num_keys: Number of keys in the batch.
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
        first: `[batch, queries]`, the position at which the document of each query begins.
        query_mask: `[batch, queries]`, False for queries in no run.
        key_mask: `[batch, keys]`, False at padding; `None` without padding.
        num_keys: Number of keys in a row of the batch.
        most_keys: Maximum number of keys in all runs together; `None` for no limit. Padding inside a text gives runs
            that share keys, so the total may exceed the keys of the batch.

    Returns:
        The runs, or `None` if they have more keys than `most_keys`.
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
    """Returns the concatenated ranges `start, start + 1, ...`, `[sum of sizes]`."""
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
