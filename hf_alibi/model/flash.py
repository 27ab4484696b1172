"""FlashAttention 2 with ALiBi: given the slopes, the kernel itself adds -m |i - j|.

The kernel takes whole causal sequences in which the queries belong to the last keys. Batches with padding, documents
or caches are cut into runs (`runs.py`). Within a run, distances are differences of indices, as the kernel assumes.

Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning"
(arXiv 2307.08691). The package flash-attn supports ALiBi since version 2.4.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .inputs import AttentionInputs, attention_inputs
from .layout import TokenLayout

HOW_TO_GET_FLASH_ATTENTION = (
    "On a CUDA machine, `pip install flash-attn` builds it, and `pip install kernels` downloads a built version; "
    "sdpa needs neither."
)


def flash_attention_2_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: TokenLayout,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes attention with FlashAttention 2. The arguments are those of `eager_attention_forward`.

    Returns:
        The output `[batch, queries, heads, head_dim]`, and `None` in place of attention weights.

    Raises:
        ValueError: If the dtype is float32 or float64, with a mask of queries times keys, or if slopes are trained.
        ImportError: If the kernel is not installed.
    """
    # Imported here, so that a checkpoint loads even if Transformers moves this function.
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    inputs = attention_inputs(query, key, value, attention_mask, scaling, dropout)
    name = module.config._attn_implementation
    (flash, flash_varlen, *_), _ = lazy_import_flash_attention(name)
    if flash is None or flash_varlen is None:
        # Transformers 5.19 asks for a kernel that is missing once, and then takes it for loaded.
        raise ImportError(f"The kernel of {name} is not installed. {HOW_TO_GET_FLASH_ATTENTION}")
    return alibi_flash_attention(inputs, attention_mask, flash, flash_varlen), None


def alibi_flash_attention(
    inputs: AttentionInputs,
    layout: TokenLayout,
    flash_attn_func: Callable[..., Tensor],
    flash_attn_varlen_func: Callable[..., Tensor],
) -> Tensor:
    """Computes attention with FlashAttention 2.

    Args:
        inputs: In bfloat16 or float16. If `layout.length` is set, there are exactly that many keys.
        layout: Positions and visibility of the tokens.
        flash_attn_func: The kernel of this name, for sequences of equal length.
        flash_attn_varlen_func: The kernel of this name, for runs.

    Returns:
        `[batch, queries, heads, head_dim]`. Padding whose output is unused (`TokenLayout.query_mask`) gets zeros.

    Raises:
        ValueError: If the dtype is float32 or float64, with a mask of queries times keys, or if slopes are trained.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"flash_attention_2 computes in bfloat16 and float16, not in {query.dtype}: load the model with "
            "dtype=torch.bfloat16, run it under torch.autocast, or use sdpa."
        )
    if layout.mask is not None:
        raise ValueError(
            f"flash_attention_2 takes no mask of queries times keys, got one of shape {tuple(layout.mask.shape)}; "
            "use sdpa, or a mask of shape [batch, tokens]."
        )
    if torch.is_grad_enabled() and inputs.slopes.requires_grad:
        raise ValueError("flash_attention_2 has no gradient for slopes; train them with sdpa.")

    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    options: dict[str, Any] = {"dropout_p": inputs.dropout, "softmax_scale": inputs.scaling, "causal": True}
    options["alibi_slopes"] = inputs.slopes.float()
    if layout.length is not None:
        return flash_attn_func(query, key, value, **options)
    batch, num_queries = query.shape[:2]
    runs = layout.all_runs(batch)
    if not runs.query_sizes:
        return torch.zeros_like(query)
    query, key, value = (states.flatten(0, 1) for states in (query, key, value))
    if runs.keys is not None:
        key, value = key[runs.keys], value[runs.keys]
    output = flash_attn_varlen_func(
        query if runs.queries is None else query[runs.queries],
        key,
        value,
        cu_seqlens_q=runs.query_bounds,
        cu_seqlens_k=runs.key_bounds,
        max_seqlen_q=max(runs.query_sizes),
        max_seqlen_k=max(runs.key_sizes),
        **options,
    )
    if runs.queries is not None:
        output = output.new_zeros(query.shape).index_copy(0, runs.queries, output)
    return output.unflatten(0, (batch, num_queries))
