"""The windows of a whole decoder: from its norms, if these alone bound every score, and the cache made for them.

A window is computed only from norms that are known to be the ones that run, with whole weights (`norms.known_gain`).
"""

from typing import Any

import torch
from torch import Tensor

from .cache import WindowedCache
from .layers import AlibiGPTAttention
from .recording import is_exported
from .windows import WindowGuarantee, qk_norm_guarantee


def window_guarantees(decoder: Any) -> list[WindowGuarantee] | None:
    """Returns the windows of each layer of an `AlibiGPTModel`, see its method of this name."""
    gains = _known_gains(decoder) if decoder.config.windows_follow_from_weights else None
    if gains is None:
        return None
    slopes = decoder.slopes(decoder.embed_tokens.weight).tolist()
    return [qk_norm_guarantee(slopes, *pair, decoder.config.window_tolerance) for pair in gains]


def windowed_cache(decoder: Any, offloading: bool) -> WindowedCache | None:
    """Returns an empty cache for an `AlibiGPTModel`, see its method of this name."""
    is_here = not any(hasattr(weight, "device_mesh") or weight.is_meta for weight in decoder.parameters())
    can_be_read = is_here and decoder.config._attn_implementation == "sdpa"
    guarantees = window_guarantees(decoder) if can_be_read else None
    if guarantees is None:
        return None
    slopes = decoder.slopes(decoder.embed_tokens.weight).detach()
    windows = [guarantee.windows for guarantee in guarantees]
    return WindowedCache(windows, slopes, offloading, made_for=_slopes_and_gains(decoder))


def check_windowed_cache(decoder: Any, cache: WindowedCache) -> None:
    """Raises `ValueError` if attention cannot read this cache, or its windows are not those of the weights."""
    if decoder.config._attn_implementation != "sdpa":
        raise ValueError(
            f"Only sdpa reads a WindowedCache, not {decoder.config._attn_implementation}; pass a DynamicCache."
        )
    if is_exported():
        raise ValueError(
            "An exported program would hold the WindowedCache at the length that it has now; pass a DynamicCache, "
            "or cache_implementation='dynamic' in the generation config."
        )
    if cache.made_for is None:
        return
    now = _slopes_and_gains(decoder)
    # A draft model that exits early uses the first layers of the cache.
    if now is None or not torch.equal(now, cache.made_for[: len(now)].to(now)):
        raise ValueError(
            "This WindowedCache was made when the slopes or the norms of queries and keys were others: weights "
            "have changed since, or an adapter, a hook or sharding has been added. Its windows may be too narrow "
            "now; call model.windowed_cache() again, or pass a DynamicCache."
        )


def _known_gains(decoder: Any) -> list[tuple[Tensor, Tensor]] | None:
    """Returns the gains of queries and keys of each layer, or `None` if those of any layer are not known."""
    layers = decoder.layers[: decoder.config.num_hidden_layers]
    # Another pipeline stage has these layers without attention.
    attentions = [getattr(layer, "self_attn", None) for layer in layers]
    gains = [attention.known_gains() for attention in attentions if type(attention) is AlibiGPTAttention]
    known = [pair for pair in gains if pair is not None]
    return known if len(known) == len(attentions) else None


def _slopes_and_gains(decoder: Any) -> Tensor | None:
    """Returns what windows follow from in one row; `None` if not all of it is known."""
    gains = _known_gains(decoder)
    if gains is None:
        return None
    slopes = decoder.slopes(decoder.embed_tokens.weight)
    return torch.cat([slopes, *(gain.to(slopes) for pair in gains for gain in pair)]).detach()
