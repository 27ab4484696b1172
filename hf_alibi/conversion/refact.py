"""Refact-1.6B (remote code `GPTRefactForCausalLM` of smallcloudai).

Refact has LayerNorm without bias (llama.cpp takes it for RMSNorm, which computes something else), one key-value head,
no biases, and a head that is not tied to the embedding. SwiGLU's two matrices are stacked, gate first; so are keys and
values. Sources: llama.cpp's `convert_hf_to_gguf.py` for the names, and the model's first code for the formula.
"""

from typing import Any

from torch import Tensor

from . import naive
from .fields import Fields
from .rules import GATE_UP, QKV, Plan, Read, Rule, renames, stacked

ARCHITECTURES = ("GPTRefactForCausalLM",)
RENAMES = {
    "wte": "model.embed_tokens",
    "h.{}.ln_1": "model.layers.{}.input_layernorm",
    "h.{}.attn.q": QKV[0],
    "h.{}.attn.c_proj": "model.layers.{}.self_attn.o_proj",
    "h.{}.ln_2": "model.layers.{}.post_attention_layernorm",
    "h.{}.mlp.c_proj": "model.layers.{}.mlp.down_proj",
    "ln_f": "model.norm",
}


def inner_size(width: int) -> int:
    """Returns the rows of the gate in a layer of nominal `width`: two thirds, rounded up to a multiple of 256."""
    return -(-int(2 * width / 3) // 256) * 256


def read(source: Fields) -> Plan:
    """Returns the plan that the config of a Refact asks for."""
    fields = source.common(ARCHITECTURES)
    hidden_size = source.size("n_embd", "hidden_size", default=2048)
    heads = source.size("n_head", "num_attention_heads", default=32)
    if hidden_size % heads:
        raise source.refusal("n_head", f"it must divide n_embd, {hidden_size}")
    head_dim = hidden_size // heads
    inner = inner_size(source.size("n_inner", default=None) or 4 * hidden_size)
    source.only("multi_query", True, reason="a Refact has one head of keys and values")
    source.only("scale_attn_weights", True, reason="scores are always scaled here")
    source.only("activation_function", None, "silu", reason="a Refact is made with silu")
    for name in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "attention_bias_in_fp32"):
        # Only changes the precision.
        source.neutral(name, bool)
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        # The model's code has no dropout.
        source.number(name, default=0.0)
    fields |= {
        "vocab_size": source.size("vocab_size", default=49216),
        "hidden_size": hidden_size,
        "intermediate_size": inner,
        "num_hidden_layers": source.size("n_layer", "num_hidden_layers", default=32),
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "training_length": source.size("n_positions", "max_position_embeddings", default=4096),
        "norm_eps": source.number("layer_norm_epsilon", default=1e-5),
        "initializer_range": source.number("initializer_range", default=0.02),
        "use_cache": source.flag("use_cache", default=True),
        "tie_word_embeddings": source.flag("tie_word_embeddings", default=False),
        "bos_token_id": source.token("bos_token_id"),
        "eos_token_id": source.token("eos_token_id"),
        "pad_token_id": source.token("pad_token_id"),
        "norm_type": "layernorm",
        "hidden_act": "silu",
        "mlp_gated": True,
        "qk_norm": False,
    }
    rules = [
        Rule(("h.{}.attn.kv",), QKV[1:], stacked(head_dim, head_dim)),
        Rule(("h.{}.mlp.gate_up_proj",), GATE_UP, stacked(inner, inner)),
        *renames(RENAMES),
    ]
    return Plan(fields, rules, prefix="transformer.", reference=reference)


def reference(config: dict[str, Any], read: Read, tokens: Tensor) -> Tensor:
    """Computes Refact in float64: from tokens `[length]` to logits `[length, vocab_size]`."""
    heads, eps = config.get("n_head", 32), config.get("layer_norm_epsilon", 1e-5)
    states = read("wte.weight")[tokens]
    head_dim = states.shape[-1] // heads
    for layer in range(config.get("n_layer", 32)):
        block = f"h.{layer}"
        normed = naive.layer_norm(states, read(f"{block}.ln_1.weight"), None, eps)
        query = (normed @ read(f"{block}.attn.q.weight").T).unflatten(-1, (heads, head_dim))
        key, value = (normed @ read(f"{block}.attn.kv.weight").T).unflatten(-1, (2, 1, head_dim)).unbind(1)
        attended = naive.attention((query, key, value), naive.slopes(heads), head_dim**-0.5)
        states = states + attended @ read(f"{block}.attn.c_proj.weight").T
        normed = naive.layer_norm(states, read(f"{block}.ln_2.weight"), None, eps)
        gate, up = (normed @ read(f"{block}.mlp.gate_up_proj.weight").T).chunk(2, -1)
        states = states + (naive.silu(gate) * up) @ read(f"{block}.mlp.c_proj.weight").T
    head = read("wte.weight") if config.get("tie_word_embeddings", False) else read("lm_head.weight")
    return naive.layer_norm(states, read("ln_f.weight"), None, eps) @ head.T
