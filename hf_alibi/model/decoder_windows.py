"""The lossless windows of a whole decoder, and the caches that are made for it.

Windows are computed from the gains of QK-norm, if these alone bound every score (`norms.known_gain`).
"""

from typing import Any

import torch
from torch import Tensor

from .cache import WindowedCache
from .growing import GrowingCache, GrowingLayer
from .layers import AlibiGPTAttention
from .ranks import heads_of_this_rank, is_divided
from .recording import is_exported
from .windows import WindowGuarantee, qk_norm_guarantee


def window_guarantees(decoder: Any) -> list[WindowGuarantee] | None:
    """Returns the windows of each layer, see `AlibiGPTModel.window_guarantees`."""
    gains = _known_gains(decoder) if decoder.config.windows_follow_from_weights else None
    if gains is None:
        return None
    config, slopes = decoder.config, decoder.slopes(decoder.embed_tokens.weight).tolist()
    return [qk_norm_guarantee(slopes, *pair, config.head_dim, config.window_tolerance) for pair in gains]


def windowed_cache(decoder: Any, offloading: bool) -> WindowedCache | None:
    """Returns an empty cache, see `AlibiGPTModel.windowed_cache`."""
    is_here = not any(is_divided(weight) or weight.is_meta for weight in decoder.parameters())
    can_be_read = is_here and decoder.config._attn_implementation == "sdpa"
    guarantees = window_guarantees(decoder) if can_be_read else None
    if guarantees is None:
        return None
    slopes = decoder.slopes(decoder.embed_tokens.weight).detach()
    heads = heads_of_this_rank(decoder.layers[0].self_attn.q_proj.weight, len(slopes))
    windows = [guarantee.windows[heads] for guarantee in guarantees]
    return WindowedCache(windows, slopes[heads], offloading, made_for=_slopes_and_gains(decoder))


def new_cache(decoder: Any, offloading: bool, windowed: bool) -> GrowingCache:
    """Returns an empty cache, see `AlibiGPTModel.new_cache`."""
    cache = windowed_cache(decoder, offloading) if windowed else None
    if cache is not None:
        return cache
    return GrowingCache([GrowingLayer() for _ in range(decoder.config.num_hidden_layers)], offloading)


def check_own_cache(decoder: Any, cache: GrowingCache) -> None:
    """Checks that the model can use this cache.

    Raises:
        ValueError: If the backend cannot read it, if the bias is not linear, if the model is being exported, or if the
            weights or modules from which its windows were computed have changed.
    """
    if is_exported():
        raise ValueError(
            f"An exported program would fix the {type(cache).__name__} at its current length; pass a DynamicCache, or "
            "set cache_implementation='dynamic' in the generation config."
        )
    if not isinstance(cache, WindowedCache):
        return
    if decoder.config._attn_implementation != "sdpa":
        raise ValueError(
            f"Only sdpa can read a WindowedCache, not {decoder.config._attn_implementation}; pass a DynamicCache."
        )
    if not decoder.has_linear_bias:
        raise ValueError("A WindowedCache needs a linear bias, which alone gives windows; pass a DynamicCache.")
    if cache.made_for is None:
        return
    now = _slopes_and_gains(decoder)
    # A draft model with early exit has fewer layers than the cache.
    if now is None or not torch.equal(now, cache.made_for[: len(now)].to(now)):
        raise ValueError(
            "This WindowedCache was made for other slopes or other norms of queries and keys: weights have changed "
            "since, or an adapter, a hook or sharding has been added. Its windows may be too narrow now; call "
            "model.windowed_cache() again, or pass a DynamicCache."
        )


def _attentions(decoder: Any) -> list[Any]:
    """Returns the attention of each layer; `None` for layers of other pipeline stages, which have none here."""
    return [getattr(layer, "self_attn", None) for layer in decoder.layers[: decoder.config.num_hidden_layers]]


def _known_gains(decoder: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Returns the gains of queries and keys of each layer, or `None` if they do not bound all scores."""
    attentions = _attentions(decoder)
    gains = [attention.known_gains() for attention in attentions if type(attention) is AlibiGPTAttention]
    known = [pair for pair in gains if pair is not None]
    return known if len(known) == len(attentions) else None


def _slopes_and_gains(decoder: Any) -> Tensor | None:
    """Returns slopes and gains, from which windows follow, in one dimension; `None` if the gains are unknown."""
    if _known_gains(decoder) is None:
        return None
    slopes = decoder.slopes(decoder.embed_tokens.weight)
    norms = [norm for attention in _attentions(decoder) for norm in (attention.q_norm, attention.k_norm)]
    return torch.cat([slopes, *(norm.weight.to(slopes) for norm in norms if norm.weight is not None)]).detach()
