"""Lossless head windows: the distance beyond which a head cannot see anything that a float would show.

Let U bound the scores before the bias, |q_i . k_j| / sqrt(d) <= U. A key at distance n then weighs at most
e^(U - m n), and the keys up to the query itself together at least e^(-U) times a geometric series in e^(-m).
The keys further away than W therefore have at most the fraction

    e^(2U - m (W + 1))

of the softmax's mass, and leaving them out changes the output by at most twice that times max |v|. For a
tolerance eps the fraction stays below eps from

    W = ceil((2U + ln(1 / eps)) / m)

on, which at eps = 2^-24, the rounding of float32, makes the window an exact rewriting for every practical
purpose. The sum of all windows is a constant: attention costs linear time, however long the text.

Attention takes U from the norms of the queries and keys at hand, which holds whatever has made them. A cache that
is to throw keys away must know U before any data: QK-norm gives it, from the weights alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

UNLIMITED = 2**62  # tokens: a window that every text fits in


def head_windows(slopes: Tensor, score_bounds: Tensor, tolerance: float) -> Tensor:
    """Returns for every head the distance W beyond which keys may be left out, `[heads]`, integers.

    It is `UNLIMITED` for a bound that is not finite, and for a slope that has become 0 in float32.

    Args:
        slopes: `[heads]`, in nats per token.
        score_bounds: U of every head or of all, in nats, `[heads]` or `[]`.
        tolerance: eps, the fraction of the softmax's mass that may be lost, above 0.
    """
    distances = (2 * score_bounds.double() - math.log(tolerance)) / slopes.detach().double()
    return torch.where(distances < UNLIMITED, distances.ceil(), UNLIMITED).long()  # NaN is not less


def qk_norm_bound(query_gain: Tensor, key_gain: Tensor) -> Tensor:
    """Returns U, `[]`, for queries and keys out of an RMSNorm with these gains, by Cauchy and Schwarz.

    Normed vectors have length sqrt(d), so their weighted product is at most d times the largest product of
    gains, and U is that over sqrt(d). Rounded to bfloat16, queries, keys and gains may each exceed their
    exact values by 2^-9, which 1% covers.

    Args:
        query_gain: `[head_dim]`.
        key_gain: `[head_dim]`.
    """
    largest = (query_gain.detach().float() * key_gain.detach().float()).abs().max()
    return 1.01 * math.sqrt(len(query_gain)) * largest


def norm_bounds(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Returns U of every query head, `[heads]`, for the queries and keys at hand.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_value_heads, keys, head_dim]`.
        scaling: Factor of the scores.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    longest_query, longest_key = (
        torch.linalg.vector_norm(states.detach(), dim=-1, dtype=dtype).amax((0, 2)) for states in (query, key)
    )
    groups = len(longest_query) // len(longest_key)
    return longest_query * longest_key.repeat_interleave(groups) * scaling * (1 + 1e-6)


@dataclass(frozen=True)
class WindowGuarantee:
    """The windows of a layer with QK-norm, and what leaving out the rest can change.

    Attributes:
        slopes: Of every query head, in nats per token.
        windows: Of every query head, in tokens.
        score_bound: U, in nats.
        tolerance: eps; outputs change by at most 2 eps max |v|.
    """

    slopes: list[float]
    windows: list[int]
    score_bound: float
    tolerance: float

    def __str__(self) -> str:
        """A table of the windows, a line for each head, and the guarantee."""
        rows = [f"{'head':>4}  {'slope':>10}  {'window':>10}"]
        for head, (slope, window) in enumerate(zip(self.slopes, self.windows, strict=True)):
            rows.append(f"{head:>4}  {slope:>10.3g}  {window:>10,}")
        rows.append(f"together {sum(self.windows):,} keys a query, whatever the length of the text")
        rows.append(
            f"|score| <= {self.score_bound:.4g} nats; outputs change by at most {2 * self.tolerance:.3g} max|v|"
        )
        return "\n".join(rows)


def qk_norm_guarantee(slopes: list[float], query_gain: Tensor, key_gain: Tensor, tolerance: float) -> WindowGuarantee:
    """Returns the windows of a layer whose queries and keys come out of an RMSNorm with these gains.

    Args:
        slopes: Of every query head, in nats per token.
        query_gain: `[head_dim]`.
        key_gain: `[head_dim]`.
        tolerance: eps, above 0.
    """
    bound = qk_norm_bound(query_gain, key_gain).cpu()
    windows = head_windows(torch.tensor(slopes, dtype=torch.float64), bound, tolerance)
    return WindowGuarantee(slopes, windows.tolist(), bound.item(), tolerance)
