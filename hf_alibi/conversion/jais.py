"""JAIS-13B and 30B (remote code `JAISLMHeadModel`; Sengupta et al., arXiv 2308.16149).

The model is GPT-2 with ALiBi, SwiGLU (its gate is `c_fc2`) and the maximal update parametrisation (muP): embeddings
and logits have multipliers, and scores are divided by head_dim instead of its root. Conversion folds the multipliers
into weights. If the head shares the embeddings, which are multiplied by a, the last norm takes the output's multiplier
divided by a. `Conv1D` stores its matrices transposed. Sources: vLLM's `models/jais.py` and `configs/jais.py`, and the
model's `configuration_jais.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from ..model.alibi import alibi_slopes
from . import naive
from .fields import ONE_DROPOUT, Fields
from .rules import QKV, Plan, Read, Rule, Weights, renames, scaled, stacked, transposed, transposes

ARCHITECTURES = ("JAISLMHeadModel", "JAISModel")
RENAMES = {
    "h.{}.ln_1": "model.layers.{}.input_layernorm",
    "h.{}.ln_2": "model.layers.{}.post_attention_layernorm",
}
TRANSPOSES = {
    "h.{}.attn.c_proj": "model.layers.{}.self_attn.o_proj",
    "h.{}.mlp.c_fc": "model.layers.{}.mlp.up_proj",
    "h.{}.mlp.c_proj": "model.layers.{}.mlp.down_proj",
}
GATE = {"h.{}.mlp.c_fc2": "model.layers.{}.mlp.gate_proj"}
SLOPES = "relative_pe.slopes"


def read(source: Fields, architectures: tuple[str, ...] = ARCHITECTURES) -> Plan:
    """Returns the plan that the config of a JAIS, or of a BTLM, asks for."""
    fields = source.common(architectures)
    source.choice("position_embedding_type", {"alibi": True}, default="learned")
    hidden_size = source.size("n_embd", "hidden_size", default=768)
    heads = source.size("n_head", "num_attention_heads", default=12)
    if hidden_size % heads:
        raise source.refusal("n_head", f"it must divide n_embd, {hidden_size}")
    act = source.value("activation_function", default="gelu_new")
    if act != "swiglu" and act not in ACT2FN:
        raise source.refusal("activation_function", f"only swiglu and {', '.join(ACT2FN)} are known")
    scaling, training_length = _scaling(source)
    fields |= {
        "vocab_size": source.size("vocab_size", default=50257),
        "hidden_size": hidden_size,
        "num_hidden_layers": source.size("n_layer", "num_hidden_layers", default=12),
        "num_attention_heads": heads,
        "intermediate_size": source.size("n_inner", default=None) or 4 * hidden_size,
        "hidden_act": "silu" if act == "swiglu" else act,
        "mlp_gated": act == "swiglu",
        "training_length": training_length,
        "alibi_scaling": scaling,
        "norm_eps": source.number("layer_norm_epsilon", default=1e-5),
        "hidden_dropout": source.number("resid_pdrop", default=0.1),
        "attention_dropout": source.number("attn_pdrop", default=0.1),
        "initializer_range": source.number("initializer_range", default=0.02),
        "use_cache": source.flag("use_cache", default=True),
        "tie_word_embeddings": source.flag("tie_word_embeddings", default=True),
        "bos_token_id": source.token("bos_token_id", 50256),
        "eos_token_id": source.token("eos_token_id", 50256),
        "pad_token_id": source.token("pad_token_id"),
        "norm_type": "layernorm",
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
    }
    if source.number("embd_pdrop", default=0.1) != fields["hidden_dropout"]:
        raise source.refusal("embd_pdrop", f"it must equal resid_pdrop, {fields['hidden_dropout']}; {ONE_DROPOUT}")
    source.only("scale_attn_weights", True, reason="scores are always scaled here")
    source.only("scale_attn_by_inverse_layer_idx", False, reason="all layers scale their scores alike here")
    # Only changes the precision.
    source.neutral("reorder_and_upcast_attn", bool)
    source.neutral("mup", bool)
    for name in ("type", "first_dropout", "proj_to_labels", "use_proj", "activation"):
        # Belongs to heads that are not converted.
        source.neutral(f"summary_{name}", str, float, bool)
    return _plan(source, fields)


def _scaling(source: Fields) -> tuple[dict[str, Any] | None, int]:
    """Returns `alibi_scaling` and the training length. JAIS calls a dynamic scaling linear with a `train_seq_len`."""
    length = source.size("n_positions", "max_position_embeddings", default=1024)
    value = source.value("alibi_scaling", default=None)
    match value:
        case None:
            return None, length
        case {"type": "linear", "factor": int() | float() as factor, **rest} if not rest and factor >= 1:
            return {"type": "linear", "factor": factor}, length
        case {"type": "linear", "train_seq_len": int() as training_length, **rest} if not rest and training_length > 1:
            return {"type": "dynamic"}, training_length
    raise source.refusal("alibi_scaling", "it must be linear, with a factor of at least 1 or with train_seq_len")


def _multipliers(source: Fields) -> tuple[float, float, bool]:
    """Returns the multipliers of embeddings and logits, and whether scores are divided by head_dim.

    The config of JAIS-13B has other names for them.
    """
    embeddings = source.number("mup_embeddings_scale", "embeddings_scale", default=1.0)
    width = source.number("mup_width_scale", default=1.0)
    alpha = source.number("mup_output_alpha", default=1.0)
    logits = source.number("width_scale", default=width * alpha)
    if not embeddings or not logits:
        name = "mup_width_scale" if embeddings else "mup_embeddings_scale"
        raise source.refusal(name, "a multiplier must be positive")
    return embeddings, logits, source.flag("mup_scale_qk_dot_by_d", "scale_qk_dot_by_d", default=False)


def _plan(source: Fields, fields: dict[str, Any]) -> Plan:
    embeddings, logits, is_divided_by_dim = _multipliers(source)
    head_dim = fields["hidden_size"] // fields["num_attention_heads"]
    query_factor = head_dim**-0.5 if is_divided_by_dim else 1.0
    split = stacked(*[fields["hidden_size"]] * 3)

    def fused(weights: Weights) -> Weights:
        return split(transposed(weights))

    last = logits / embeddings if fields["tie_word_embeddings"] else logits
    rules = [
        Rule(("wte",), ("model.embed_tokens",), scaled(embeddings)),
        Rule(("h.{}.attn.c_attn",), QKV, scaled(query_factor, fused)),
        *renames(RENAMES),
        *transposes(TRANSPOSES | (GATE if fields["mlp_gated"] else {})),
        Rule(("ln_f",), ("model.norm",), scaled(last)),
    ]
    folded = []
    if embeddings != 1:
        folded.append(f"The multiplier of the embeddings, {embeddings:g}, is in the embeddings.")
    if last != 1:
        folded.append(f"The multiplier of the logits, {logits:g}, is in the last norm.")
    if is_divided_by_dim:
        folded.append(f"The queries hold 1 / sqrt({head_dim}), so that scores are divided by head_dim.")
    differs = ["In training, muP's learning rates belong to its multipliers, which are in the weights now."]
    return Plan(
        fields,
        rules,
        ignored=(r"h\.\d+\.attn\.(bias|masked_bias)", r"relative_pe\.slopes"),
        prefix="transformer.",
        folded=folded,
        differs=differs if folded else [],
        reference=reference,
        checks={SLOPES: torch.tensor(alibi_slopes(fields["num_attention_heads"]))},
    )


def reference(config: dict[str, Any], read: Read, tokens: Tensor) -> Tensor:
    """Computes JAIS and BTLM in float64: from tokens `[length]` to logits `[length, vocab_size]`."""
    heads, eps = config.get("n_head", 12), config.get("layer_norm_epsilon", 1e-5)
    by_dim = config.get("mup_scale_qk_dot_by_d", config.get("scale_qk_dot_by_d", False))
    output = config.get("mup_output_alpha", 1.0) * config.get("mup_width_scale", 1.0)
    kind = config.get("activation_function", "gelu_new")
    scaling = config.get("alibi_scaling") or {}
    divisor = scaling.get("factor") or max(1.0, len(tokens) / scaling.get("train_seq_len", math.inf))

    def linear(name: str, states: Tensor) -> Tensor:  # Conv1D: [inputs, outputs]
        return states @ read(f"{name}.weight") + read(f"{name}.bias")

    def norm(name: str, states: Tensor) -> Tensor:
        return naive.layer_norm(states, read(f"{name}.weight"), read(f"{name}.bias"), eps)

    states = read("wte.weight")[tokens] * config.get("mup_embeddings_scale", config.get("embeddings_scale", 1.0))
    head_dim = states.shape[-1] // heads
    for layer in range(config.get("n_layer", 12)):
        block = f"h.{layer}"
        fused = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", states))
        qkv = [part.unflatten(-1, (heads, head_dim)) for part in fused.chunk(3, -1)]
        scale = 1 / head_dim if by_dim else head_dim**-0.5
        attended = naive.attention(qkv, naive.slopes(heads) / divisor, scale)
        states = states + linear(f"{block}.attn.c_proj", attended)
        normed = norm(f"{block}.ln_2", states)
        inner = linear(f"{block}.mlp.c_fc", normed)
        is_gated = kind == "swiglu"
        inner = inner * naive.silu(linear(f"{block}.mlp.c_fc2", normed)) if is_gated else ACT2FN[kind](inner)
        states = states + linear(f"{block}.mlp.c_proj", inner)
    head = read("wte.weight") if config.get("tie_word_embeddings", True) else read("lm_head.weight")
    return norm("ln_f", states) @ head.T * config.get("width_scale", output)
