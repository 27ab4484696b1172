"""Continuous batching: requests join and leave the batch at every step, and share the pages of one cache.

Transformers lays the new tokens of all requests in one row, and the keys that these see, read out of the pages, in
another. The queries of a request are the last of its keys, so in both rows a request is a causal text by itself, and
gets the tokens that `generate` gives to it alone:

    settings = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512)  # of the cache; of a pass
    outputs = model.generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=20, continuous_batching_config=settings)
    outputs["req_0"].generated_tokens

Without these settings the cache takes most of the memory, and without `max_new_tokens` or an end of text a request
never ends.

`sdpa` goes from request to request, each with its windows (`causal.py`). `eager`, which Transformers then calls
`paged|eager`, writes out the scores of all queries against all keys and hides those of other requests.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .attention import backend
from .configuration_alibi_gpt import AlibiGPTConfig
from .layout import Shared, TokenLayout
from .recording import is_compiled
from .runs import runs_of_bounds


class PagedCache(Cache):
    """The cache of continuous batching, with the `update` of any other cache."""

    def __init__(self, pages: Any, indices: dict[str, Any]) -> None:
        """Takes the pages of all requests and the arguments of this pass that say where to write and to read."""
        super().__init__(layers=[])
        self.pages = pages
        self.indices = indices

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores keys and values of the pass, `[1, key_value_heads, queries, head_dim]`, and returns those to see."""
        return self.pages.update(key_states, value_states, layer_idx, dict(self.indices))  # which it changes


def is_paged(cache: Any, arguments: dict[str, Any]) -> bool:
    """Whether a forward pass belongs to continuous batching, which alone says where in its pages to write.

    Raises:
        ValueError: If the cache is of another kind that Transformers' `Cache` is no base class of.
    """
    if cache is None or isinstance(cache, Cache):
        return False
    if "write_index" not in arguments:
        raise ValueError(
            f"The cache is a {type(cache).__name__}, which no attention here can read; pass a DynamicCache, or "
            "another Cache of Transformers."
        )
    return True


def paged_config(config: AlibiGPTConfig, batching: Any) -> Any:
    """Returns a copy of the settings for continuous batching that does not change to FlashAttention by itself.

    Args:
        config: Of the model.
        batching: A `ContinuousBatchingConfig`, or `None`.

    Raises:
        ValueError: For attention implementations, slopes and CUDA graphs that continuous batching would get wrong.
    """
    if not backend(config._attn_implementation).paged:
        raise ValueError(
            f"Continuous batching adds the ALiBi bias with sdpa and eager, not with {config._attn_implementation}; "
            "call model.set_attn_implementation('sdpa') first."
        )
    if config.slopes_depend_on_length:
        raise ValueError(
            f"alibi_scaling={config.alibi_scaling} has other slopes for every length, and continuous batching has "
            "requests of different lengths in one pass; use generate, or a linear alibi_scaling."
        )
    # Only here, as a checkpoint must load without continuous batching.
    from transformers.generation import ContinuousBatchingConfig

    batching = copy.copy(batching) if batching is not None else ContinuousBatchingConfig()
    graphs = batching.use_cuda_graph
    if any(graphs) if isinstance(graphs, tuple | list) else graphs:
        raise ValueError(
            f"The shapes of every request's attention are its own, which CUDA graphs cannot record: "
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
    """Lays out the tokens of one pass of continuous batching; arguments are named as Transformers passes them.

    Args:
        slopes: `[heads]`, the slopes of all query heads.
        attention_mask: `[1, 1, queries, keys]`, added to the scores.
        position_ids: `[1, queries]`, the position of each token in its request.
        cu_seq_lens_q: `[requests + 1]`, where the requests begin and end among the queries.
        cu_seq_lens_k: By the one kind of attention there is, the same among the keys.

    Raises:
        ValueError: Without a mask, which is how FlashAttention is called.
    """
    if attention_mask is None:
        raise ValueError(
            "Continuous batching without an attention mask is meant for FlashAttention, which would drop the ALiBi "
            "bias here; use sdpa."
        )
    (key_bounds,) = cu_seq_lens_k.values()
    slots = torch.arange(attention_mask.shape[-1], dtype=key_bounds.dtype, device=key_bounds.device)
    starts = key_bounds[torch.searchsorted(key_bounds, slots, right=True) - 1]
    layout = TokenLayout(slopes, position_ids, (slots - starts)[None], Shared(), mask=attention_mask)
    if is_compiled():
        return layout
    return layout._replace(runs=runs_of_bounds(cu_seq_lens_q, key_bounds, *attention_mask.shape[-2:]))
