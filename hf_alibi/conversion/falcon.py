"""Falcon with ALiBi: Falcon-RW, and the parallel and the new decoder (`falcon` in Transformers).

Falcon divides the bias by sqrt(head_dim), as it does the scores. Conversion divides the slopes. Transformers' class
rounds the bias to bfloat16, whatever the dtype of the model, which is no part of the architecture. So verification
uses the formula, and states how far that class is from it. That class adds the bias twice with `eager`, and once with
`sdpa`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ..model.alibi import alibi_slopes
from . import naive
from .fields import ONE_DROPOUT, Fields
from .rules import QKV, Plan, Read, Rule, interleaved, renames, stacked

ARCHITECTURES = ("FalconForCausalLM", "FalconModel", "RWForCausalLM")
RENAMES = {
    "word_embeddings": "model.embed_tokens",
    "h.{}.self_attention.dense": "model.layers.{}.self_attn.o_proj",
    "h.{}.mlp.dense_h_to_4h": "model.layers.{}.mlp.up_proj",
    "h.{}.mlp.dense_4h_to_h": "model.layers.{}.mlp.down_proj",
    "ln_f": "model.norm",
}
INPUT_NORM, MLP_NORM = "model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm"


@dataclass(frozen=True)
class Layout:
    """How a decoder layer of a Falcon is built.

    Attributes:
        heads: Query heads.
        key_heads: Heads of keys and values.
        head_dim: Width of a head.
        is_parallel: Whether attention and feed-forward layer read the same residual stream.
        norms: Norms before a parallel layer.
        is_grouped: Whether the fused matrix is stored by groups of heads. Otherwise keys and values come last.
    """

    heads: int
    key_heads: int
    head_dim: int
    is_parallel: bool
    norms: int
    is_grouped: bool

    def rules(self) -> list[Rule]:
        """Returns the table of the weights."""
        if self.is_grouped:
            split = interleaved(self.key_heads, self.head_dim)
        else:
            split = stacked(self.heads * self.head_dim, self.head_dim, self.head_dim)
        rules = [Rule(("h.{}.self_attention.query_key_value",), QKV, split), *renames(RENAMES)]
        if self.norms == 2:
            return rules + renames({"h.{}.ln_attn": INPUT_NORM, "h.{}.ln_mlp": MLP_NORM})
        if self.is_parallel:
            # Falcon has one norm where AlibiGPT has two equal ones.
            return [
                *rules,
                Rule(("h.{}.input_layernorm",), (INPUT_NORM, MLP_NORM), lambda weights: [*weights, *weights]),
            ]
        return rules + renames({"h.{}.input_layernorm": INPUT_NORM, "h.{}.post_attention_layernorm": MLP_NORM})


def _layout(source: Fields, hidden_size: int) -> Layout:
    heads = source.size("num_attention_heads", "n_head", default=71)
    if hidden_size % heads:
        raise source.refusal("num_attention_heads", f"it must divide hidden_size, {hidden_size}")
    key_heads = source.size("num_kv_heads", "n_head_kv", default=None) or heads
    is_new = source.flag("new_decoder_architecture", default=False)
    is_multi_query = source.flag("multi_query", default=True)
    if not is_new:
        # The old decoder ignores num_kv_heads.
        key_heads = 1 if is_multi_query else heads
    is_parallel = source.flag("parallel_attn", default=True)
    if is_new and not is_parallel:
        raise source.refusal("parallel_attn", "the new decoder is always parallel")
    norms = source.size("num_ln_in_parallel_attn", default=None) or (2 if is_new else 1)
    if norms not in ((1, 2) if is_new else (1,)):
        raise source.refusal("num_ln_in_parallel_attn", "only the new decoder has two norms, and none has more")
    return Layout(heads, key_heads, hidden_size // heads, is_parallel, norms, is_new or not is_multi_query)


def read(source: Fields) -> Plan:
    """Returns the plan that the config of a Falcon asks for."""
    if not source.flag("alibi", default=False):
        raise source.refusal("alibi", "only models with ALiBi can be converted, and this one is rotary")
    fields = source.common(ARCHITECTURES)
    hidden_size = source.size("hidden_size", "n_embed", default=4544)
    layout = _layout(source, hidden_size)
    bias = source.flag("bias", default=False)
    act = source.value("activation", default="gelu")
    if act not in ACT2FN:
        raise source.refusal("activation", f"only {', '.join(ACT2FN)} are known")
    fields |= {
        "vocab_size": source.size("vocab_size", default=65024),
        "hidden_size": hidden_size,
        "num_hidden_layers": source.size("num_hidden_layers", "n_layer", default=32),
        "num_attention_heads": layout.heads,
        "num_key_value_heads": layout.key_heads,
        "intermediate_size": source.size("ffn_hidden_size", default=None) or 4 * hidden_size,
        "hidden_act": act,
        "training_length": source.size("max_position_embeddings", default=2048),
        "alibi_slopes": [slope / math.sqrt(layout.head_dim) for slope in alibi_slopes(layout.heads)],
        "use_parallel_residual": layout.is_parallel,
        "norm_eps": source.number("layer_norm_epsilon", default=1e-5),
        "hidden_dropout": source.number("hidden_dropout", default=0.0),
        "attention_dropout": source.number("attention_dropout", default=0.0),
        "initializer_range": source.number("initializer_range", default=0.02),
        "use_cache": source.flag("use_cache", default=True),
        "tie_word_embeddings": source.flag("tie_word_embeddings", default=True),
        "bos_token_id": source.token("bos_token_id", 11),
        "eos_token_id": source.token("eos_token_id", 11),
        "pad_token_id": source.token("pad_token_id"),
        "norm_type": "layernorm",
        "norm_bias": True,
        "attention_bias": bias,
        "mlp_bias": bias,
        "qk_norm": False,
    }
    if fields["hidden_dropout"] != fields["attention_dropout"]:
        # Falcon also applies attention_dropout to the output of the attention.
        raise source.refusal(
            "hidden_dropout", f"it must equal attention_dropout, {fields['attention_dropout']}; {ONE_DROPOUT}"
        )
    source.only(
        "apply_residual_connection_post_layernorm", False, reason="here the residual stream does not pass the norms"
    )
    # Have no effect with ALiBi.
    source.neutral("rope_parameters", dict)
    source.neutral("rope_theta", int, float)
    differs = ["The bias has the precision of float32. Transformers' Falcon rounds it to bfloat16 in every dtype."]
    if fields["hidden_dropout"]:
        differs.append("In training, hidden_dropout also drops embeddings here.")
    return Plan(
        fields, layout.rules(), prefix="transformer.", differs=differs, reference=reference, is_near_class=True
    )


def read_refined_web(source: Fields) -> Plan:
    """Returns the plan for a `RefinedWebModel`: a Falcon from before Transformers had that class.

    Its remote code existed with several defaults, so the fields whose defaults differ must be there.
    """
    for name in ("multi_query", "parallel_attn", "bias", "bos_token_id", "eos_token_id"):
        source.value(name)
    source.only("new_decoder_architecture", False, reason="a RefinedWebModel has the old decoder")
    # Transformers does not load it.
    return replace(read(source), is_near_class=False)


def reference(config: dict[str, Any], read: Read, tokens: Tensor) -> Tensor:
    """Computes Falcon in float64: from tokens `[length]` to logits `[length, vocab_size]`."""
    heads = config.get("num_attention_heads", config.get("n_head", 71))
    layers = config.get("num_hidden_layers", config.get("n_layer", 32))
    eps = config.get("layer_norm_epsilon", 1e-5)
    is_new = config.get("new_decoder_architecture", False)
    is_parallel = config.get("parallel_attn", True)
    has_two_norms = is_new and (config.get("num_ln_in_parallel_attn") or 2) == 2
    has_bias = config.get("bias", False)
    activation = ACT2FN[config.get("activation", "gelu")]

    def linear(name: str, states: Tensor) -> Tensor:
        return states @ read(f"{name}.weight").T + (read(f"{name}.bias") if has_bias else 0)

    def norm(name: str, states: Tensor) -> Tensor:
        return naive.layer_norm(states, read(f"{name}.weight"), read(f"{name}.bias"), eps)

    states = read("word_embeddings.weight")[tokens]
    head_dim = states.shape[-1] // heads
    for layer in range(layers):
        block = f"h.{layer}"
        first = norm(f"{block}.{'ln_attn' if has_two_norms else 'input_layernorm'}", states)
        fused = linear(f"{block}.self_attention.query_key_value", first).unflatten(-1, (-1, head_dim))
        if not is_new and config.get("multi_query", True):
            query, key, value = fused[:, :-2], fused[:, -2:-1], fused[:, -1:]
        else:
            groups = (config.get("num_kv_heads") or heads) if is_new else heads
            fused = fused.unflatten(1, (groups, -1))  # [length, groups, queries + 2, head_dim]
            query, key, value = fused[:, :, :-2].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
        scale = head_dim**-0.5
        attended = naive.attention((query, key, value), naive.slopes(heads) * scale, scale)
        attended = linear(f"{block}.self_attention.dense", attended)
        if has_two_norms:
            second = norm(f"{block}.ln_mlp", states)
        elif is_parallel:
            second = first
        else:
            second = norm(f"{block}.post_attention_layernorm", states + attended)
        inner = activation(linear(f"{block}.mlp.dense_h_to_4h", second))
        states = states + attended + linear(f"{block}.mlp.dense_4h_to_h", inner)
    head = "word_embeddings" if config.get("tie_word_embeddings", True) else "lm_head"
    return torch.einsum("id,vd->iv", norm("ln_f", states), read(f"{head}.weight"))
