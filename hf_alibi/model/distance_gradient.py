"""The backward pass of causal attention with a trained bias by distance, in plain matrix products.

PyTorch's kernel has no gradient of a bias. This one computes the weights P again, block by block, and from them the
gradient of the scores,

    dS = P (dO V^T - sum(dO O))

The bias is added to the scores, so its gradient at a distance is the sum of dS along a diagonal.

Source of the formula: Dao et al., "FlashAttention" (arXiv 2205.14135), algorithm 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .alibi import bias_view

# Queries and keys per block. The scores of a larger block do not stay in the processor's cache, a smaller one needs
# more calls. At this size the backward pass takes about as long as that of trained slopes (PyTorch 2.13 on an AMD
# EPYC); with 512 it takes half as long again.
DISTANCE_BLOCK = 128


def backward_by_distance(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    line: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key, value and of the bias at the distances 0 to keys - 1, `[heads, keys]`.

    Args:
        grad_output: `[batch, heads, queries, head_dim]`.
        query: `[batch, heads, queries, head_dim]`. The queries belong to the last keys.
        key: `[batch, key_value_heads, keys, head_dim]`.
        value: `[batch, key_value_heads, keys, head_dim]`.
        line: `[heads, offsets]`, the result of `causal_line`, with at least min(DISTANCE_BLOCK, queries) - 1 offsets
            ahead.
        output: `[batch, heads, queries, head_dim]`, the result of the forward pass.
        logsumexp: `[batch, heads, queries]`, the logarithm of the sum of exponentials in each softmax.
        scaling: Factor of the scores before the bias is added.
    """
    heads, num_queries, num_keys = *query.shape[1:3], key.shape[2]
    groups = heads // key.shape[1]
    grad_query, grad_key, grad_value = (torch.zeros_like(states) for states in (query, key, value))
    grad_line = torch.zeros_like(line)
    # In reverse order, so that the bias is a view.
    query, grad_output, output, logsumexp = (states.flip(2) for states in (query, grad_output, output, logsumexp))
    sums = (grad_output * output).sum(-1, keepdim=True)
    for first in range(0, num_queries, DISTANCE_BLOCK):
        rows = slice(first, min(first + DISTANCE_BLOCK, num_queries))
        q, do = query[:, :, rows], grad_output[:, :, rows]
        own = slice(num_queries - rows.stop, num_queries - rows.start)
        # The newest query of the block sees all keys but the last `first`.
        for start in range(0, num_keys - first, DISTANCE_BLOCK):
            columns = slice(start, min(start + DISTANCE_BLOCK, num_keys - first))
            k, v = (states[:, :, columns].repeat_interleave(groups, 1) for states in (key, value))
            size = q.shape[2], k.shape[2]
            bias = bias_view(line, slice(0, heads), *size, corner=first + start)
            weights = (q @ k.mT * scaling + bias - logsumexp[:, :, rows, None]).exp()
            grad_scores = weights * (do @ v.mT - sums[:, :, rows])
            grad_query[:, :, own] += (grad_scores @ k).flip(2) * scaling
            grad_key[:, :, columns] += _of_groups(grad_scores.mT @ q, groups) * scaling
            grad_value[:, :, columns] += _of_groups(weights.mT @ do, groups)
            grad_line[:, first + start : first + start + sum(size) - 1] += _diagonal_sums(grad_scores.sum(0))
    return grad_query, grad_key, grad_value, grad_line[:, :num_keys].flip(1)


def computed_scores(num_queries: int, num_keys: int) -> int:
    """Returns how many scores of a head `backward_by_distance` computes."""
    blocks = range(0, num_queries, DISTANCE_BLOCK)
    return sum(min(DISTANCE_BLOCK, num_queries - first) * (num_keys - first) for first in blocks)


def _of_groups(states: Tensor, groups: int) -> Tensor:
    """Sums over the query heads that share a key-value head."""
    return states.unflatten(1, (-1, groups)).sum(2)


def _diagonal_sums(matrix: Tensor) -> Tensor:
    """Sums all elements with equal row + column: `[heads, rows, columns]` to `[heads, rows + columns - 1]`."""
    rows, columns = matrix.shape[1:]
    # With a row of `rows` zeros more, read in rows that are one shorter: each row moves right by one.
    flat = F.pad(matrix, (0, rows)).flatten(1)[:, : rows * (rows + columns - 1)]
    return flat.unflatten(1, (rows, rows + columns - 1)).sum(1)
