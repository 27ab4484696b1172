"""Attention by the formula, the reference for every other backend.

    softmax(q k^T scaling - m |i - j|) v

All scores and weights are stored, in float32 or float64. Source: Press, Smith, Lewis (arXiv 2108.12409), section 3.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .inputs import AttentionInputs
from .layout import TokenLayout


def eager_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenLayout,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Computes attention by the formula, in float32 or float64.

    Args:
        module: The attention module. Other backends need its config.
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, key_value_heads, keys, head_dim]`.
        value: `[batch, key_value_heads, keys, head_dim]`.
        attention_mask: Positions and visibility of the tokens. Transformers gives this argument its name.
        scaling: Factor of the scores before the bias is added.
        dropout: Probability of dropping an attention weight. The caller passes 0 outside training.

    Returns:
        The output `[batch, queries, heads, head_dim]` and the weights `[batch, heads, queries, keys]`.
    """
    dtype = value.dtype
    slopes = attention_mask.slopes.to(query.device)
    inputs = AttentionInputs(query, key, value, slopes, scaling).to(slopes.dtype).with_all_heads()
    scores = inputs.query @ inputs.key.transpose(2, 3) * scaling + attention_mask.dense_bias(slopes, slice(None))
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights @ inputs.value).to(dtype).transpose(1, 2).contiguous(), weights.to(dtype)
