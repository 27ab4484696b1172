"""Continuous batching: requests join and leave the batch at every step, and share the pages of one cache.

Transformers puts the new tokens of all requests into one row, and the keys that they see, read from the pages, into
another row. The queries of a request belong to its last keys. So each request is a causal text of its own, and gets
the same tokens as from `generate`:

    # num_blocks limits the cache, max_batch_tokens limits one pass.
    settings = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)
    outputs = model.generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=20, continuous_batching_config=settings)
    outputs["req_0"].generated_tokens

Without `num_blocks` the cache takes most of the memory. Without `max_new_tokens` or an end-of-text token a request
never ends.

`sdpa` computes one request after another, each with its windows (`causal.py`). `eager`, which Transformers calls
`paged|eager` in this case, stores the scores of all queries against all keys and masks those of other requests.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from .attention import backend
from .configuration_alibi_gpt import AlibiGPTConfig
from .layout import Shared, TokenLayout
from .recording import is_compiled
from .runs import runs_of_bounds


class PagedCache(Cache):
    """The paged cache of continuous batching behind the `update` method that all caches have."""

    def __init__(self, pages: Any, indices: dict[str, Any]) -> None:
        """Wraps a paged cache for one pass.

        Args:
            pages: Transformers' cache with the pages of all requests.
            indices: The arguments of this pass that contain the indices to write and to read.
        """
        super().__init__(layers=[])
        self.pages = pages
        self.indices = indices

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores keys and values `[1, key_value_heads, queries, head_dim]`; returns all that the requests see."""
        # A copy, because Transformers changes the dictionary.
        return self.pages.update(key_states, value_states, layer_idx, dict(self.indices))


def is_paged(cache: Any, arguments: dict[str, Any]) -> bool:
    """Whether a forward pass belongs to continuous batching: only this passes indices of pages to write to.

    Raises:
        ValueError: If the cache is neither a paged one nor a `Cache` of Transformers for a decoder.
    """
    if cache is None or (isinstance(cache, Cache) and not isinstance(cache, EncoderDecoderCache)):
        return False
    if "write_index" not in arguments:
        raise ValueError(
            f"The cache is a {type(cache).__name__}, which no attention backend can read; pass a DynamicCache, or "
            "another Cache of Transformers."
        )
    return True


def paged_config(config: AlibiGPTConfig, batching: Any) -> Any:
    """Returns a copy of the settings for continuous batching with the automatic switch to FlashAttention turned off.

    Args:
        config: The model's config.
        batching: A `ContinuousBatchingConfig`, or `None` for the default.

    Raises:
        ValueError: If continuous batching cannot give right results with the attention implementation, with a dynamic
            `alibi_scaling`, or with CUDA graphs.
    """
    if not backend(config._attn_implementation).paged:
        raise ValueError(
            f"Continuous batching works with sdpa and eager, not with {config._attn_implementation}; "
            "call model.set_attn_implementation('sdpa') first."
        )
    if config.slopes_depend_on_length:
        raise ValueError(
            f"alibi_scaling={config.alibi_scaling} has different slopes for each length, but continuous batching "
            "computes requests of different lengths in one pass; use generate, or a linear alibi_scaling."
        )
    # Imported here, so that a checkpoint loads with a Transformers that has no continuous batching.
    from transformers.generation import ContinuousBatchingConfig

    batching = copy.copy(batching) if batching is not None else ContinuousBatchingConfig()
    graphs = batching.use_cuda_graph
    if any(graphs) if isinstance(graphs, tuple | list) else graphs:
        raise ValueError(
            f"The attention of each request has its own shapes, which CUDA graphs cannot record: "
            f"leave out use_cuda_graph={graphs}."
        )
    batching.auto_switch_to_flash = False
    batching.use_cuda_graph = False
    return batching


def paged_layout(
    slopes: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: dict[str, Tensor],
    **kwargs: Any,
) -> TokenLayout:
    """Returns the layout of one pass of continuous batching. Transformers gives the arguments their names.

    Args:
        slopes: `[heads]`, the slopes of all query heads.
        attention_mask: `[1, 1, queries, keys]`, added to the scores.
        position_ids: `[1, queries]`, the position of each token in its request.
        cu_seq_lens_q: `[requests + 1]`, the bounds of the requests among the queries.
        cu_seq_lens_k: One entry, by the model's single kind of attention: `[requests + 1]`, the bounds of the requests
            among the keys.

    Raises:
        ValueError: Without a mask. Transformers passes none for FlashAttention.
    """
    if attention_mask is None:
        raise ValueError(
            "Continuous batching without an attention mask is meant for FlashAttention, which would drop the ALiBi "
            "bias; call model.set_attn_implementation('sdpa') first."
        )
    (key_bounds,) = cu_seq_lens_k.values()
    slots = torch.arange(attention_mask.shape[-1], dtype=key_bounds.dtype, device=key_bounds.device)
    starts = key_bounds[torch.searchsorted(key_bounds, slots, right=True) - 1]
    layout = TokenLayout(slopes, position_ids, (slots - starts)[None], Shared(), mask=attention_mask)
    if is_compiled():
        return layout
    return layout._replace(runs=runs_of_bounds(cu_seq_lens_q, key_bounds, *attention_mask.shape[-2:]))
