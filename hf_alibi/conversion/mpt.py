"""MPT, with the config of Transformers or of llm-foundry, which trained its checkpoints.

MPT has LayerNorm without bias, exact GELU, and no biases unless `no_bias=False`. Queries, keys and values are stacked
in one matrix and clipped at `clip_qkv`. Source: github.com/mosaicml/llm-foundry, `models/mpt` and `models/layers`.

Transformers' class ignores `alibi_bias_max`, `expansion_ratio`, `logit_scale`, `no_bias=False`, `norm_type`,
`attn_type` and the fields of llm-foundry. Here they have the same meaning as in training, and a model that uses one of
them is compared with the formula instead of that class. That class also fails beyond `max_seq_len` tokens.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.configuration_alibi_gpt import AlibiGPTConfig
from . import naive
from .fields import LOSSLESS, ONE_DROPOUT, Fields
from .rules import QKV, Plan, Read, Rule, joined, renames, scaled, stacked

ARCHITECTURES = ("MptForCausalLM", "MPTForCausalLM", "MptModel", "MPTModel")
PREFIX = "transformer."
RENAMES = {
    "wte": "model.embed_tokens",
    "blocks.{}.norm_1": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.out_proj": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.norm_2": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.ffn.up_proj": "model.layers.{}.mlp.up_proj",
    "blocks.{}.ffn.down_proj": "model.layers.{}.mlp.down_proj",
}
GATE = {"blocks.{}.ffn.gate_proj": "model.layers.{}.mlp.gate_proj"}
NORMS = {
    "low_precision_layernorm": "layernorm",
    "layernorm": "layernorm",
    "rmsnorm": "rmsnorm",
    "low_precision_rmsnorm": "rmsnorm",
    "triton_rmsnorm": "rmsnorm",
}
ACTIVATIONS = {
    ("gelu", "none"): "gelu",
    ("gelu", "tanh"): "gelu_pytorch_tanh",
    ("silu", None): "silu",
    ("relu", None): "relu",
}


def read(source: Fields) -> Plan:
    """Returns the plan that the config of an MPT asks for, by the rules of llm-foundry."""
    fields = source.common(ARCHITECTURES)
    hidden_size = source.size("d_model", "hidden_size", default=2048)
    no_bias = source.flag("no_bias", default=True)
    norm_type = source.choice("norm_type", NORMS, default="low_precision_layernorm")
    fields |= {
        "vocab_size": source.size("vocab_size", default=50368),
        "hidden_size": hidden_size,
        "num_hidden_layers": source.size("n_layers", "num_hidden_layers", default=24),
        "num_attention_heads": source.size("n_heads", "num_attention_heads", default=16),
        "training_length": source.size("max_seq_len", default=2048),
        "norm_type": norm_type,
        "norm_bias": not no_bias and norm_type == "layernorm",
        "norm_eps": source.number("layer_norm_epsilon", "norm_eps", default=1e-5),
        "attention_bias": not no_bias,
        "mlp_bias": not no_bias,
        "hidden_dropout": source.number("resid_pdrop", default=0.0),
        "initializer_range": source.number("initializer_range", default=0.02),
        "use_cache": source.flag("use_cache", default=False),
        "tie_word_embeddings": source.flag("tie_word_embeddings", default=True),
        "bos_token_id": source.token("bos_token_id"),
        "eos_token_id": source.token("eos_token_id"),
        "pad_token_id": source.token("pad_token_id"),
        "qk_norm": False,
    }
    if source.number("emb_pdrop", default=0.0) != fields["hidden_dropout"]:
        raise source.refusal("emb_pdrop", f"it must equal resid_pdrop, {fields['hidden_dropout']}; {ONE_DROPOUT}")
    ratio = source.number("expansion_ratio", default=4)
    fields |= _feed_forward(source.inner("ffn_config"), int(hidden_size * ratio))
    attention = source.inner("attn_config")
    fields |= _attention(attention, fields)
    scale = attention.number("softmax_scale", default=None)
    logit_scale = source.value("logit_scale", default=None)
    if logit_scale == "inv_sqrt_d_model":
        logit_scale = hidden_size**-0.5
    elif not isinstance(logit_scale, int | float | None) or isinstance(logit_scale, bool):
        raise source.refusal("logit_scale", "it must be a number or 'inv_sqrt_d_model'")
    source.only("embedding_fraction", 1.0, reason="the gradient of the embeddings is not scaled here")
    source.only("residual_modification", None, reason="the residual stream is a plain sum here")
    source.only("final_logit_softcapping", None, reason="logits are not capped here")
    source.only("block_overrides", None, reason="all layers are alike here")
    for name, kind in {"learned_pos_emb": bool, "verbose": int, "init_device": str, "init_config": dict}.items():
        # learned_pos_emb has no effect with ALiBi.
        source.neutral(name, kind)
    # Only a residual_modification uses it.
    source.neutral("residual_coeff", float)
    source.neutral("use_pad_tok_in_ffn", bool)
    source.neutral("name", str)
    source.neutral("tokenizer_name", str)
    source.neutral("loss_fn", str)
    _only_torch(source, "fc_type")
    fused = attention.flag("fused_qkv", default=True)
    attention.finish()
    return _plan(fields, scale, logit_scale, fused)


def _only_torch(source: Fields, name: str) -> None:
    source.only(name, "torch", {"name": "torch"}, reason="only the linear layers of torch can be read")


def _feed_forward(source: Fields, default_size: int) -> dict[str, Any]:
    gated = source.choice("ffn_type", {"mptmlp": False, "mptglu": True}, default="mptmlp")
    activation = source.value("ffn_act_fn", default=None) or {"name": "gelu", "approximate": "none"}
    if not isinstance(activation, dict) or set(activation) - {"name", "approximate"}:
        raise source.refusal("ffn_act_fn", "it must be a name, and for gelu an approximation")
    key = activation.get("name"), activation.get("approximate", "none" if activation.get("name") == "gelu" else None)
    if key not in ACTIVATIONS:
        raise source.refusal("ffn_act_fn", f"only {', '.join(str(known[0]) for known in ACTIVATIONS)} are known")
    size = source.size("ffn_hidden_size", default=None) or default_size
    _only_torch(source, "fc_type")
    source.finish()
    return {"mlp_gated": gated, "hidden_act": ACTIVATIONS[key], "intermediate_size": size}


def _attention(source: Fields, fields: dict[str, Any]) -> dict[str, Any]:
    """Reads all fields of `attn_config` but softmax_scale and fused_qkv, which concern the weights."""
    heads = fields["num_attention_heads"]
    kinds = {"multihead_attention": heads, "multiquery_attention": 1, "grouped_query_attention": None}
    key_heads = source.choice("attn_type", kinds, default="multihead_attention")
    own = source.size("kv_n_heads", default=None)
    if key_heads is None and own is None:
        raise source.refusal("kv_n_heads", "grouped_query_attention needs it")
    if key_heads is not None and own not in (None, key_heads):
        raise source.refusal("kv_n_heads", f"the attn_type has {key_heads}")
    if not source.flag("alibi", default=True):
        raise source.refusal("alibi", "only models with ALiBi can be converted")
    source.only("rope", False, reason="there are no rotary positions here")
    source.only("qk_ln", False, reason="a norm over all heads together has no place here")
    source.only("qk_gn", False, reason="a LayerNorm over each head has no place here; qk_norm is an RMSNorm")
    source.only("prefix_lm", False, reason="attention is causal here")
    source.only("attn_uses_sequence_id", False, reason="documents are told apart by position_ids here")
    source.only("sliding_window_size", -1, reason="there are no sliding windows here")
    source.only("attn_logit_softcapping", None, reason="scores are not capped here")
    source.only("kv_dim", None, fields["hidden_size"], reason="keys come from the hidden states here")
    source.only("flex_attn_mod_list", [], None, reason="scores are not modified here")
    source.only("reuse_kv_layer_idx", None, reason="each layer has keys of its own here")
    for name in ("rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config"):
        # Has no effect without rope.
        source.neutral(name, int, float, str, dict)
    source.neutral("attn_impl", str)
    source.common(())
    return {
        "num_key_value_heads": key_heads or own,
        "attention_dropout": source.number("attn_pdrop", default=0.0),
        "alibi_max_bias": source.number("alibi_bias_max", default=8),
        # 0 means no clipping.
        "clip_qkv": source.number("clip_qkv", default=None) or None,
    }


def _plan(fields: dict[str, Any], scale: float | None, logit_scale: float | None, fused: bool) -> Plan:
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    key_size = fields["num_key_value_heads"] * head_dim
    query_factor = 1.0 if scale is None else scale * math.sqrt(head_dim)
    if abs(query_factor - 1) < 1e-6:
        query_factor = 1.0
    elif fields["clip_qkv"] is not None:
        raise Fields({"softmax_scale": scale}, "MPT", "attn_config.").refusal(
            "softmax_scale", "with clip_qkv it must be 1 / sqrt(head_dim): a scale in the projections would be clipped"
        )
    split = stacked(fields["hidden_size"], key_size, key_size)
    if fused:
        rules = [Rule(("blocks.{}.attn.Wqkv",), QKV, scaled(query_factor, split), joined)]
    else:
        rules = [Rule(("blocks.{}.attn.Wq",), QKV[:1], scaled(query_factor))]
        rules += renames({"blocks.{}.attn.Wk": QKV[1], "blocks.{}.attn.Wv": QKV[2]})
    rules += renames(RENAMES | (GATE if fields["mlp_gated"] else {}))
    rules.append(Rule(("norm_f",), ("model.norm",), scaled(1.0 if logit_scale is None else logit_scale)))
    folded = []
    if query_factor != 1:
        folded.append(f"softmax_scale {scale:g} is in the query projections.")
    if logit_scale not in (None, 1):
        folded.append(f"logit_scale {logit_scale:g} is in the last norm.")
    # Whether the class of Transformers computes this model. It accepts attn_pdrop=0, but not 0.0.
    is_heeded = (
        isinstance(fields["attention_dropout"], int)
        and not fields["attention_bias"]
        and fields["norm_type"] == "layernorm"
        and fields["num_key_value_heads"] == fields["num_attention_heads"]
        and fields["alibi_max_bias"] == 8
        and (fields["hidden_act"], fields["mlp_gated"]) == ("gelu", False)
        and fields["intermediate_size"] == 4 * fields["hidden_size"]
        and logit_scale in (None, 1)
        and fused
    )
    differs = []
    if fields["pad_token_id"] is not None:
        differs.append("In training, the embedding of the padding token is not changed.")
    return Plan(
        fields,
        rules,
        prefix=PREFIX,
        folded=folded,
        differs=differs,
        reference=None if is_heeded else reference,
        max_length=fields["training_length"] if is_heeded else None,
    )


def reference(config: dict[str, Any], read: Read, tokens: Tensor) -> Tensor:
    """Computes llm-foundry's MPT in float64: from tokens `[length]` to logits `[length, vocab_size]`."""
    attn, ffn = config.get("attn_config") or {}, config.get("ffn_config") or {}
    width, heads = config.get("d_model", 2048), config.get("n_heads", 16)
    key_heads = {"multiquery_attention": 1}.get(attn.get("attn_type", ""), attn.get("kv_n_heads") or heads)
    head_dim = width // heads
    slope = naive.slopes(heads, attn.get("alibi_bias_max", 8))
    scale = attn.get("softmax_scale") or head_dim**-0.5
    limit = attn.get("clip_qkv") or math.inf
    has_bias = not config.get("no_bias", True)
    eps = config.get("layer_norm_epsilon", config.get("norm_eps", 1e-5))
    act = ffn.get("ffn_act_fn") or {"name": "gelu"}

    def linear(name: str, states: Tensor) -> Tensor:
        return states @ read(f"{name}.weight").T + (read(f"{name}.bias") if has_bias else 0)

    def norm(name: str, states: Tensor) -> Tensor:
        if "rmsnorm" in config.get("norm_type", ""):
            return naive.rms_norm(states, read(f"{name}.weight"), eps)
        return naive.layer_norm(states, read(f"{name}.weight"), read(f"{name}.bias") if has_bias else None, eps)

    def activation(states: Tensor) -> Tensor:
        return getattr(F, act["name"])(states, **{key: value for key, value in act.items() if key != "name"})

    states = read("wte.weight")[tokens]
    for layer in range(config.get("n_layers", 24)):
        block = f"blocks.{layer}"
        normed = norm(f"{block}.norm_1", states)
        if attn.get("fused_qkv", True):
            qkv = linear(f"{block}.attn.Wqkv", normed)
        else:
            qkv = torch.cat([linear(f"{block}.attn.W{name}", normed) for name in "qkv"], -1)
        heads_of = qkv.clamp(-limit, limit).unflatten(-1, (-1, head_dim)).split([heads, key_heads, key_heads], 1)
        states = states + linear(f"{block}.attn.out_proj", naive.attention(heads_of, slope, scale))
        normed = norm(f"{block}.norm_2", states)
        inner = linear(f"{block}.ffn.up_proj", normed)
        if ffn.get("ffn_type") == "mptglu":
            inner = inner * activation(linear(f"{block}.ffn.gate_proj", normed))
        else:
            inner = activation(inner)
        states = states + linear(f"{block}.ffn.down_proj", inner)
    factor = config.get("logit_scale") or 1.0
    factor = width**-0.5 if factor == "inv_sqrt_d_model" else factor
    head = read("wte.weight") if config.get("tie_word_embeddings", True) else read("lm_head.weight")
    return norm("norm_f", states) @ head.T * factor


def write(config: AlibiGPTConfig, ours: Fields) -> Plan:
    """Returns the plan for the equal MPT of Transformers. Raises `UserError` for what that class cannot compute."""
    fields = ours.common(("AlibiGPTForCausalLM",))
    wanted = {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "intermediate_size": 4 * config.hidden_size,
        "mlp_gated": False,
        "hidden_act": "gelu",
        "alibi_max_bias": 8,
        "alibi_slopes": None,
        "alibi_slopes_trainable": False,
        "alibi_scaling": None,
        "qk_norm": False,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_type": "layernorm",
        "norm_bias": False,
        "embedding_norm": False,
        "use_parallel_residual": False,
        "window_tolerance": min(config.window_tolerance, LOSSLESS),
    }
    ours.trained_with("Transformers' MPT", wanted)
    # Without QK-norm it means nothing.
    ours.value("qk_norm_gain")
    ours.only("attention_dropout", 0, reason="the config of Transformers' MPT only accepts whole numbers")
    attention = {"clip_qkv": ours.number("clip_qkv", default=None), "alibi": True}
    fields |= {
        "vocab_size": ours.size("vocab_size"),
        "d_model": ours.size("hidden_size"),
        "n_layers": ours.size("num_hidden_layers"),
        "n_heads": ours.size("num_attention_heads"),
        "max_seq_len": ours.size("training_length"),
        "layer_norm_epsilon": ours.number("norm_eps"),
        "resid_pdrop": config.hidden_dropout,
        "emb_pdrop": ours.number("hidden_dropout"),
        "initializer_range": ours.number("initializer_range"),
        "use_cache": ours.flag("use_cache"),
        "tie_word_embeddings": ours.flag("tie_word_embeddings"),
        "bos_token_id": ours.token("bos_token_id"),
        "eos_token_id": ours.token("eos_token_id"),
        "pad_token_id": ours.token("pad_token_id"),
        "attn_config": attention,
    }
    rules = [Rule(("blocks.{}.attn.Wqkv",), QKV, back=joined), *renames(RENAMES | {"norm_f": "model.norm"})]
    return Plan(fields, rules, prefix=PREFIX, max_length=fields["max_seq_len"])
