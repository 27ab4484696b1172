"""Arguments of a forward pass that have no parameter of their own: each is understood, harmless, or refused by name.

Transformers' models take any argument and ignore those that they do not know. An ignored mask changes results without
a word, so this model ignores only what cannot change them.
"""

from difflib import get_close_matches
from typing import Any

import torch
from transformers.cache_utils import Cache

from .recording import is_recorded

HARMLESS = {
    # What is returned, and how. The decorators of `forward` have read these.
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "return_loss",
    # The loss, which the heads compute.
    "ignore_index",
    "num_items_in_batch",
    "shift_labels",
    # What `generate` keeps for itself and passes on all the same.
    "assistant_model",
    "assistant_tokenizer",
    "streamer",
    "tokenizer",
    # What tokenizers return besides tokens and mask.
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


def check_arguments(arguments: dict[str, Any], num_queries: int, cache: Cache | None) -> None:
    """Refuses arguments that would change the result of another model and cannot change that of this one.

    Args:
        arguments: Those without a parameter of their own. `None` stands for an argument that is not given.
        num_queries: Tokens in the pass.
        cache: The cache, before it gets the keys of this pass.

    Raises:
        ValueError: Names the argument.
    """
    tracing = is_recorded()
    for name, value in arguments.items():
        if value is None or name in HARMLESS:
            continue
        if name in ALL_ZERO:
            if not tracing and bool(torch.as_tensor(value).any()):
                raise ValueError(
                    f"{name} must be all zero: this model has no embeddings for kinds of tokens. Leave it out; "
                    f"tokenizers do with return_{name}=False."
                )
        elif name == "is_causal":
            if not value:
                raise ValueError("is_causal=False is not supported: a token sees only itself and those before it.")
        elif name == "cache_position":
            past = 0 if cache is None else cache.get_seq_length()
            if not tracing and value.flatten().tolist() != list(range(int(past), int(past) + num_queries)):
                raise ValueError(
                    f"cache_position={value.tolist()} does not fit {num_queries} new tokens after {int(past)} cached "
                    "ones; leave it out."
                )
        else:
            near = get_close_matches(name, [*UNDERSTOOD, *HARMLESS], n=1, cutoff=0.8)
            advice = f"did you mean {near[0]}?" if near else "leave it out."
            raise ValueError(f"This model does not know the argument {name}, and ignoring it might be wrong: {advice}")
