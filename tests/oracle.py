"""ALiBi attention written from the paper's formula, in float64 and with loops where loops are plainest.

Nothing here comes from the package, so that a test against it is a test against the paper.
"""

import math

import torch
from torch import Tensor


def paper_slopes(num_heads: int) -> list[float]:
    """The slopes of section 3, and footnote's rule for a number of heads that is no power of two."""
    if math.log2(num_heads).is_integer():
        ratio = 2.0 ** (-8.0 / num_heads)
        return [ratio ** (head + 1) for head in range(num_heads)]
    below = 2 ** math.floor(math.log2(num_heads))
    return paper_slopes(below) + paper_slopes(2 * below)[::2][: num_heads - below]


def attention(
    query: Tensor, key: Tensor, value: Tensor, slopes: list[float], scaling: float, visible: Tensor | None = None
) -> Tensor:
    """softmax(q k^T scaling - m (i - j)) v over the keys j <= i, in float64.

    Args:
        query: `[batch, heads, queries, head_dim]`; the queries are the last of the keys.
        key: `[batch, key_value_heads, keys, head_dim]`.
        value: `[batch, key_value_heads, keys, head_dim]`.
        slopes: One for each query head.
        scaling: Factor of the dot products.
        visible: `[batch, queries, keys]`, further restriction; rows without a visible key give zeros.

    Returns:
        `[batch, heads, queries, head_dim]`, float64.
    """
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    key, value = (states.repeat_interleave(heads // states.shape[1], 1).double() for states in (key, value))
    outputs = []
    for start in range(0, num_queries, 512):  # blocks of rows, for the memory's sake
        rows = torch.arange(start, min(start + 512, num_queries))
        i, j = (rows + num_keys - num_queries)[:, None], torch.arange(num_keys)[None]
        bias = torch.stack([-slope * (i - j).double() for slope in slopes])
        scores = query[:, :, rows].double() @ key.transpose(2, 3) * scaling + bias
        allowed = (j <= i).expand(batch, -1, -1) if visible is None else (j <= i) & visible[:, rows]
        weights = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
        outputs.append(weights.masked_fill(~allowed.any(-1)[:, None, :, None], 0.0) @ value)
    return torch.cat(outputs, 2)
