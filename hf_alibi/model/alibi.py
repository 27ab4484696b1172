"""ALiBi, attention with linear biases: the idea itself.

A query at position i and a key at position j <= i score

    s_ij = q_i . k_j / sqrt(d)  -  m_h (i - j)

where m_h is a fixed slope of attention head h, and no position embedding is used anywhere. Heads with
steep slopes look at the last few tokens, heads with flat slopes far back, and because the penalty is
defined at every distance a model trained on short sequences reads long ones.

Source: Press, Smith, Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length
Extrapolation", ICLR 2022 (arXiv 2108.12409), section 3.
"""

import torch
from torch import Tensor


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> list[float]:
    """Returns the slope m_h of every attention head, as in the paper and its code.

    For a power of two n, m_h = 2^(-max_bias h / n), h = 1..n. For any other number, the slopes of the
    largest power of two p below it are followed by every second slope of 2p, left unsorted: trained
    checkpoints depend on that order.

    Args:
        num_heads: Number of query heads, at least 1.
        max_bias: The steepness of the geometric sequence: 8 in the paper, `alibi_bias_max` in MPT.

    Returns:
        `num_heads` positive slopes, in nats per token of distance.

    Raises:
        ValueError: If `num_heads` or `max_bias` is not positive.
    """
    if num_heads < 1 or max_bias <= 0:
        raise ValueError(f"num_heads and max_bias must be positive, got {num_heads} and {max_bias}.")
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-max_bias * head / power) for head in range(1, power + 1)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power, max_bias)[0::2][: num_heads - power]
    return slopes


def interpolated_slopes(slopes: Tensor, training_length: int, length: Tensor) -> Tensor:
    """Returns the slopes for a text of this length, flatter where it is longer than those of the training.

    The furthest token of a longer text then costs what the furthest one cost in training. Source: Al-Khateeb et al.,
    "Position Interpolation Improves ALiBi Extrapolation" (arXiv 2310.13017).

    Args:
        slopes: `[heads]`, floating point; its dtype is the result's.
        training_length: Tokens in a text of the training.
        length: Tokens in the text, a tensor without dimensions.

    Returns:
        `[heads]`: m times `training_length / length` beyond the training length, up to it the slopes themselves.
    """
    return slopes / (length.to(slopes.dtype) / training_length).clamp(min=1)


def alibi_bias(slopes: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Returns the bias of any queries against any keys: rows and columns of one and the same matrix.

    A KV cache of any kind therefore gets exactly its rows by passing the positions that it holds. The
    bias is relative, -m |i - j|, never +m j: the two differ by a constant per row, which softmax
    ignores, but only the relative form keeps small values, hence precision, near the diagonal.

    Args:
        slopes: `[heads]`, floating point; its dtype is the result's.
        query_positions: `[batch, queries]` or `[1, queries]`, integers.
        key_positions: `[batch, keys]` or `[1, keys]`, integers.

    Returns:
        `[batch, heads, queries, keys]`. Keys after the query get the symmetric value: masking the
        future is not the bias's business.
    """
    distance = (query_positions[:, None, :, None] - key_positions[:, None, None, :]).abs()
    return -slopes[:, None, None] * distance


def causal_line(slopes: Tensor, behind: int, ahead: int) -> Tensor:
    """Returns the causal bias as a function of the offset j - i alone: the one line that fills the matrix.

    Args:
        slopes: `[heads]`, floating point; its dtype is the result's.
        behind: The furthest distance into the past.
        ahead: The furthest distance into the future.

    Returns:
        `[heads, behind + 1 + ahead]`: -m (i - j) for the offsets -behind..0, and -inf for 1..ahead.
    """
    offsets = torch.arange(-behind, ahead + 1, device=slopes.device)
    return torch.where(offsets <= 0, slopes[:, None] * offsets, -torch.inf)


def bias_view(line: Tensor, heads: slice, queries: int, keys: int, corner: int) -> Tensor:
    """Returns the bias matrix of a run of queries, taken in reverse order, without storing it.

    The bias depends on j - i only. With the queries in reverse order, going down a row and going right
    a column both move one step along `line`, so a view with strides (1, 1) is the whole matrix: exact
    at any length, with the memory of a line.

    Args:
        line: `[heads, offsets]`, as `causal_line` returns it.
        heads: Which heads.
        queries: Number of queries.
        keys: Number of keys.
        corner: Index into a row of `line` of the last query against the first key.

    Returns:
        A read-only view `[1, heads, queries, keys]`; row r belongs to query `queries - 1 - r`.
    """
    length = line.shape[1]
    shape = (1, heads.stop - heads.start, queries, keys)
    return line.as_strided(shape, (line.numel(), length, 1, 1), heads.start * length + corner)


def ring_line(slopes: Tensor, window: int, capacity: int) -> Tensor:
    """Returns the bias of keys in a ring, position p in slot p modulo `capacity`, by offset from the newest slot.

    The key in slot s is (newest - s) modulo `capacity` behind the newest: a periodic function of the offset, and
    `bias_view` makes the matrix of any number of last queries from it, as it does from `causal_line`. What is
    further away than the window gets -inf, and with it keys that are newer than a query, as long as there are
    no more of them than `capacity - window - 1`.

    Args:
        slopes: `[heads]`, floating point; its dtype is the result's.
        window: The furthest distance that is visible.
        capacity: Slots of the ring.

    Returns:
        `[heads, 3 capacity - window - 2]`: offsets from 1 - capacity to 2 capacity - window - 2.
    """
    offsets = torch.arange(1 - capacity, 2 * capacity - window - 1, device=slopes.device)
    distance = -offsets % capacity
    return torch.where(distance <= window, -slopes[:, None] * distance, -torch.inf)
