"""Lossless head windows: the distance beyond which all keys of a head together weigh less than float32 rounding.

Let m be the slope of the head, and let U bound the scores before the bias: |q_i . k_j| / sqrt(d) <= U. Before
normalization, a key at distance n has a weight of at most e^(U - m n). The weights of all keys sum to at least e^(-U)
times a geometric series in e^(-m). So the keys further away than W have at most the fraction

    e^(2U - m (W + 1))

of the attention. Leaving them out changes the output by at most twice this fraction times max |v|. The fraction is
below a tolerance eps if W is at least

    W = ceil((2U + ln(1 / eps)) / m)

The default eps is 2^-24, the rounding of float32. Windows do not depend on the length of the text, so attention costs
linear time.

Attention takes U from the norms of its queries and keys, so U holds no matter how they were computed. A cache that
drops keys must know U in advance. QK-norm gives it from the weights alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A window in tokens that is longer than every text.
UNLIMITED = 2**62


def head_windows(slopes: Tensor, score_bounds: Tensor, tolerance: float) -> Tensor:
    """Returns the distance W of every head beyond which keys may be left out, `[heads]`, integers.

    W is `UNLIMITED` if the bound is not finite, or if the slope has become 0 in float32.

    Args:
        slopes: `[heads]`, in nats per token.
        score_bounds: U in nats, `[heads]`, or `[]` for all heads.
        tolerance: eps, the fraction of the attention that may be lost, above 0.
    """
    distances = (2 * score_bounds.double() - math.log(tolerance)) / slopes.detach().double()
    # NaN compares as false, so it gives UNLIMITED too.
    return torch.where(distances < UNLIMITED, distances.ceil(), UNLIMITED).long()


def qk_norm_bound(query_gain: Tensor, key_gain: Tensor, head_dim: int) -> Tensor:
    """Returns U for queries and keys that leave an RMSNorm with these gains: `[heads]`, or `[]` for all heads.

    Normalized vectors have length sqrt(d). By the Cauchy-Schwarz inequality the product of query and key is at most d
    times the largest product of gains, and U is this divided by sqrt(d). In bfloat16, rounding may increase queries,
    keys and gains by a factor of 1 + 2^-9 each. An additional 1% covers this.

    Args:
        query_gain: One for each channel, `[head_dim]`; for each head, `[heads, 1]`; or one for all, `[1]`.
        key_gain: `[head_dim]` or `[1]`.
        head_dim: d.
    """
    largest = (query_gain.detach().float() * key_gain.detach().to(query_gain.device).float()).abs().amax(-1)
    return 1.01 * math.sqrt(head_dim) * largest


def largest_norms(states: Tensor) -> Tensor:
    """Returns the largest norm among the states of each head, `[heads]`, at least in float32.

    Args:
        states: `[batch, heads, tokens, head_dim]`.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    return torch.linalg.vector_norm(states.detach(), dim=-1, dtype=dtype).amax((0, 2))


def norm_bounds(query: Tensor, key: Tensor, scaling: float, key_norms: Tensor | None = None) -> Tensor:
    """Returns U of every query head, `[heads]`, from the largest norms of its queries and keys.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_value_heads, keys, head_dim]`.
        scaling: Factor of the scores before the bias is added.
        key_norms: `[key_value_heads]`, a bound of the norms of the keys before they got the dtype of the queries;
            `None` to compute it.
    """
    longest_query, longest_key = largest_norms(query), largest_norms(key) if key_norms is None else key_norms
    rounding = 1 + 1e-6 + torch.finfo(query.dtype).eps
    return longest_query * longest_key.repeat_interleave(len(longest_query) // len(longest_key)) * scaling * rounding


@dataclass(frozen=True)
class WindowGuarantee:
    """The windows of a layer with QK-norm, and how much leaving out further keys can change the output.

    Attributes:
        slopes: The slope of every query head, in nats per token.
        windows: The window of every query head, in tokens.
        score_bounds: U of every query head, in nats.
        tolerance: eps. Outputs change by at most 2 eps max |v|.
    """

    slopes: list[float]
    windows: list[int]
    score_bounds: list[float]
    tolerance: float

    @property
    def score_bound(self) -> float:
        """The largest U of all heads, in nats."""
        return max(self.score_bounds)

    def __str__(self) -> str:
        """Returns a table with one line per head, and the guarantee."""
        rows = [f"{'head':>4}  {'slope':>10}  {'U':>6}  {'window':>10}"]
        for head, values in enumerate(zip(self.slopes, self.score_bounds, self.windows, strict=True)):
            slope, bound, window = values
            rows.append(f"{head:>4}  {slope:>10.3g}  {bound:>6.4g}  {window:>10,}")
        rows.append(f"all heads together: {sum(self.windows):,} keys per query, for any length of the text")
        rows.append(
            f"|score| <= U nats, at most {self.score_bound:.4g}; "
            f"outputs change by at most {2 * self.tolerance:.3g} max|v|"
        )
        return "\n".join(rows)


def qk_norm_guarantee(
    slopes: list[float], query_gain: Tensor, key_gain: Tensor, head_dim: int, tolerance: float
) -> WindowGuarantee:
    """Returns the windows of a layer whose queries and keys leave an RMSNorm with these gains.

    Args:
        slopes: The slope of every query head, in nats per token.
        query_gain: See `qk_norm_bound`.
        key_gain: See `qk_norm_bound`.
        head_dim: Channels of a head.
        tolerance: eps, above 0.
    """
    bounds = qk_norm_bound(query_gain, key_gain, head_dim).cpu().expand(len(slopes))
    windows = head_windows(torch.tensor(slopes, dtype=torch.float64), bounds, tolerance)
    return WindowGuarantee(slopes, windows.tolist(), bounds.tolist(), tolerance)
