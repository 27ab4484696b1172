"""The head windows of a model, and what decides them: the gains of QK-norm, and the bound U on scores."""

import math
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..model.modeling_alibi_gpt import AlibiGPTModel


def window_record(model: PreTrainedModel) -> dict[str, Any] | None:
    """Returns U, gains and windows of every layer of a model, or None if they do not follow from finite weights.

    Returns:
        `score_bound` (U in nats by layer, the largest of its heads), `score_bounds` (by layer and head),
        `query_gain` and `key_gain` (largest and mean absolute gain by layer; 1 where there are none),
        `windows` (tokens, by layer and head), and `keys` (keys that a query looks at in all heads, by layer).
    """
    # The base model, also inside wrappers of Trainer.
    decoder = next((part for part in model.modules() if isinstance(part, AlibiGPTModel)), None)
    guarantees = decoder.window_guarantees() if decoder is not None else None
    if decoder is None or guarantees is None:
        return None
    if not all(math.isfinite(guarantee.score_bound) for guarantee in guarantees):
        # Training has diverged.
        return None
    attentions: list[Any] = [layer.self_attn for layer in decoder.layers]
    gains = [attention.known_gains() for attention in attentions]
    return {
        "score_bound": [round(guarantee.score_bound, 4) for guarantee in guarantees],
        "score_bounds": [[round(bound, 4) for bound in guarantee.score_bounds] for guarantee in guarantees],
        "query_gain": [_gains(query_gain) for query_gain, _ in gains],
        "key_gain": [_gains(key_gain) for _, key_gain in gains],
        "windows": [guarantee.windows for guarantee in guarantees],
        "keys": [sum(guarantee.windows) for guarantee in guarantees],
    }


def _gains(gain: Tensor) -> list[float]:
    gains = gain.detach().float().abs()
    return [round(gains.max().item(), 4), round(gains.mean().item(), 4)]


def kept_fraction(windows: list[list[int]], length: int) -> float:
    """Returns the part of all visible pairs of query and key that lie within the windows, in a text of `length`."""
    pairs = length * (length + 1) / 2
    kept = 0.0
    heads = [min(window, length - 1) for layer in windows for window in layer]
    for window in heads:
        # The first queries see fewer keys than the window holds.
        kept += (window + 1) * (window + 2) / 2 + (length - window - 1) * (window + 1)
    return kept / (pairs * len(heads))
