"""The building blocks of the models' formulas, in float64 and as plain as possible.

They share no code with this package's model, so that an error in one of them shows in a comparison.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def slopes(heads: int, max_bias: float = 8.0) -> Tensor:
    """Returns the slopes of section 3 of the paper, `[heads]`. MPT's `alibi_bias_max` replaces the 8."""
    power = 2 ** math.floor(math.log2(heads))
    first = 2.0 ** (-max_bias * torch.arange(1, power + 1, dtype=torch.float64) / power)
    between = 2.0 ** (-max_bias * torch.arange(1, 2 * power + 1, 2, dtype=torch.float64) / (2 * power))
    return torch.cat([first, between[: heads - power]])


def attention(qkv: Sequence[Tensor], slope: Tensor, scale: float) -> Tensor:
    """Computes causal attention with ALiBi over one text.

    Args:
        qkv: Queries `[length, heads, head_dim]`, keys and values `[length, key_value_heads, head_dim]`.
        slope: `[heads]`.
        scale: Multiplies the dot products.

    Returns:
        `[length, heads * head_dim]`.
    """
    query, key, value = qkv
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    place = torch.arange(len(query))
    distance = place[:, None] - place  # [length, length]
    scores = torch.einsum("ihd,jhd->hij", query, key) * scale - slope[:, None, None] * distance
    weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value).flatten(1)


def layer_norm(states: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Computes LayerNorm: (x - mean) / sqrt(variance + eps), times weight, plus bias."""
    centred = states - states.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return normed if bias is None else normed + bias


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes RMSNorm: x / sqrt(mean square + eps), times weight."""
    return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def silu(states: Tensor) -> Tensor:
    """Computes SiLU: x / (1 + e^-x)."""
    return states * states.sigmoid()
