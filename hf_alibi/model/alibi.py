"""ALiBi, attention with linear biases: each score is lowered in proportion to the distance of query and key.

The score of a query at position i and a key at position j <= i is

    s_ij = q_i . k_j / sqrt(d)  -  m_h (i - j)

where m_h is the slope of attention head h and d the head dimension. There are no position embeddings. Heads with steep
slopes see the last few tokens, heads with flat slopes see far back. The penalty is defined at every distance, so a
model that was trained on short sequences can read long ones.

Source: Press, Smith, Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length
Extrapolation", ICLR 2022 (arXiv 2108.12409), section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> list[float]:
    """Returns the slope m_h of every attention head, as in the paper and its code.

    If the number of heads n is a power of two, m_h = 2^(-max_bias h / n) for h = 1..n. For any other number, the
    slopes of the largest power of two p below it come first, followed by every second slope of 2p. They stay unsorted,
    because trained checkpoints depend on this order.

    Args:
        num_heads: Number of query heads, at least 1.
        max_bias: Exponent of the geometric sequence: 8 in the paper, `alibi_bias_max` in MPT.

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
    """Returns the slopes for a text of this length, which are flatter if the text exceeds the training length.

    The penalty of the furthest token is then no larger than it was in training. Source: Al-Khateeb et al.,
    "Position Interpolation Improves ALiBi Extrapolation" (arXiv 2310.13017).

    Args:
        slopes: `[heads]`, floating point; its dtype is the result's.
        training_length: Number of tokens in a training sequence.
        length: Number of tokens in the text, a tensor without dimensions.

    Returns:
        `[heads]`: the slopes times `training_length / length` if that is below 1, otherwise the slopes themselves.
    """
    return slopes / (length.to(slopes.dtype) / training_length).clamp(min=1)


def alibi_bias(slopes: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Returns the bias for queries and keys at any positions.

    A KV cache gets the right bias from the positions of the keys that it holds. The bias is the relative -m |i - j|,
    not the absolute +m j. For visible keys the two differ by a constant per row, which softmax ignores. But only the
    relative form has small values near the diagonal, where rounding matters most.

    Args:
        slopes: `[heads]`, floating point; its dtype is the result's. Or `[heads, distances]`, any bias by distance.
        query_positions: `[batch, queries]` or `[1, queries]`, integers.
        key_positions: `[batch, keys]` or `[1, keys]`, integers.

    Returns:
        `[batch, heads, queries, keys]`. Keys after the query get the symmetric value; the caller masks them.
    """
    distance = (query_positions[:, None, :, None] - key_positions[:, None, None, :]).abs()
    if slopes.dim() == 2:
        return slopes[:, distance[:, 0]].transpose(0, 1)
    return -slopes[:, None, None] * distance


def causal_line(slopes: Tensor, behind: int, ahead: int) -> Tensor:
    """Returns the causal bias by offset j - i. Every row of the bias matrix is a part of this line.

    Args:
        slopes: `[heads]`, floating point; its dtype is the result's. Or `[heads, distances]`, any bias by distance.
        behind: Largest distance into the past.
        ahead: Largest distance into the future.

    Returns:
        `[heads, behind + 1 + ahead]`: -m (i - j) for the offsets -behind..0, and -inf for 1..ahead.
    """
    if slopes.dim() == 2:
        return F.pad(slopes.narrow(1, 0, behind + 1).flip(1), (0, ahead), value=-torch.inf)
    offsets = torch.arange(-behind, ahead + 1, device=slopes.device)
    return torch.where(offsets <= 0, slopes[:, None] * offsets, -torch.inf)


def bias_view(line: Tensor, heads: slice, queries: int, keys: int, corner: int) -> Tensor:
    """Returns the bias matrix of consecutive queries, in reverse order, without storing it.

    The bias depends on j - i only. With the queries in reverse order, the next row and the next column are both one
    step further along `line`. So a view of the line with strides (1, 1) is the whole matrix. It is exact at any length
    and takes only the memory of the line.

    Args:
        line: `[heads, offsets]`, as `causal_line` or `ring_line` returns it.
        heads: Heads to view.
        queries: Number of queries.
        keys: Number of keys.
        corner: Index into `line` of the offset from the last query to the first key.

    Returns:
        A read-only view `[1, heads, queries, keys]`; row r belongs to query `queries - 1 - r`.
    """
    length = line.shape[1]
    shape = (1, heads.stop - heads.start, queries, keys)
    return line.as_strided(shape, (line.numel(), length, 1, 1), heads.start * length + corner)


def ring_line(slopes: Tensor, window: int, capacity: int) -> Tensor:
    """Returns the bias of keys in a ring buffer by offset from the slot of the newest key.

    The ring stores position p in slot p modulo `capacity`. The distance from the newest key to the key in slot s is
    (newest - s) modulo `capacity`, a periodic function of the offset. `bias_view` makes the matrix for the last
    queries from this line, as from `causal_line`.

    Distances beyond the window get -inf. For an earlier query, a newer key appears at such a distance, so it is hidden
    too. This holds for up to `capacity - window - 1` newer keys.

    Args:
        slopes: `[heads]`, floating point; its dtype is the result's.
        window: Largest visible distance.
        capacity: Number of slots.

    Returns:
        `[heads, 3 capacity - window - 2]`, for offsets from 1 - capacity to 2 capacity - window - 2.
    """
    offsets = torch.arange(1 - capacity, 2 * capacity - window - 1, device=slopes.device)
    distance = -offsets % capacity
    return torch.where(distance <= window, -slopes[:, None] * distance, -torch.inf)
