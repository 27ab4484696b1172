"""Checks of the arguments of a forward pass. Each in `**kwargs` is used, known to be harmless, or refused by name.

Transformers' models accept any argument and ignore unknown ones. An ignored mask would give wrong results without any
error, so this model ignores only arguments that cannot change results.
"""

from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .recording import has_values, is_recorded

HARMLESS = {
    # They decide what is returned, and `forward` reads them elsewhere.
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "return_loss",
    "skip_logits",
    # They belong to the loss, which the heads compute.
    "ignore_index",
    "num_items_in_batch",
    "shift_labels",
    # `generate` uses them itself, but passes them on.
    "assistant_model",
    "assistant_tokenizer",
    "streamer",
    "tokenizer",
    # Tokenizers return them together with tokens and mask.
    "length",
    "num_truncated_tokens",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "overflowing_tokens",
    "special_tokens_mask",
}
ALL_ZERO = ("token_type_ids", "mm_token_type_ids")
UNDERSTOOD = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "labels",
    "logits_to_keep",
)


def check_shape(inputs_embeds: Tensor) -> None:
    """Checks that a pass has tokens.

    Args:
        inputs_embeds: `[batch, queries, hidden_size]`, the embeddings of the tokens.

    Raises:
        ValueError: If it has another number of dimensions, or no token.
    """
    if inputs_embeds.dim() != 3 or (not is_recorded() and 0 in inputs_embeds.shape):
        raise ValueError(
            "input_ids must be [batch, tokens] and inputs_embeds [batch, tokens, hidden_size], with at least one text "
            f"and one token; embeddings have the shape {list(inputs_embeds.shape)}."
        )


def check_arguments(arguments: dict[str, Any], num_queries: int, cache: Cache | None, cached_layer: int = 0) -> None:
    """Checks that no argument asks for something that this model does not do.

    Args:
        arguments: The `**kwargs` of the forward pass. `None` counts as not given.
        num_queries: Number of tokens in the pass.
        cache: The cache before this pass.
        cached_layer: Index of a layer whose part of the cache is on this rank.

    Raises:
        ValueError: For the first such argument; the message names it.
    """
    for name, value in arguments.items():
        if value is None or name in HARMLESS:
            continue
        if name in ALL_ZERO:
            value = torch.as_tensor(value)
            if has_values(value) and bool(value.any()):
                raise ValueError(
                    f"{name} must be all zero, because this model has no token type embeddings. Leave it out; "
                    f"tokenizers do so with return_{name}=False."
                )
        elif name == "is_causal":
            if not value:
                raise ValueError(
                    "is_causal=False is not supported: a token sees only itself and earlier tokens. Leave it out."
                )
        elif name == "cache_position":
            past = 0 if cache is None else cache.get_seq_length(cached_layer)
            if has_values(value) and value.flatten().tolist() != list(range(int(past), int(past) + num_queries)):
                raise ValueError(
                    f"cache_position={value.tolist()} does not fit {num_queries} new tokens after {int(past)} cached "
                    "ones; leave it out."
                )
        else:
            near = get_close_matches(name, [*UNDERSTOOD, *HARMLESS], n=1, cutoff=0.8)
            advice = f"did you mean {near[0]}?" if near else "leave it out."
            raise ValueError(
                f"This model does not know the argument {name}, and ignoring it might give wrong results: {advice}"
            )
