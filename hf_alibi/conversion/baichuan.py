"""Baichuan-13B and Baichuan2-13B, base and chat (remote code `BaichuanForCausalLM`; arXiv 2309.10305).

The models have RMSNorm, SwiGLU and no biases. Queries, keys and values are stacked in one matrix. The head of
Baichuan2 is a NormHead, which normalises its rows in each call; conversion normalises them once. No field of the
config names the generation or the size. As in vLLM (`models/baichuan.py`), a vocabulary of 125,696 means Baichuan2,
and a width of 4,096 means the rotary 7B. The 7B also has `max_position_embeddings` where the 13B has
`model_max_length`.
"""

from typing import Any

import torch
from torch import Tensor

from . import naive
from .fields import Fields
from .rules import QKV, Plan, Read, Rule, Weights, renames, stacked

ARCHITECTURES = ("BaichuanForCausalLM",)
RENAMES = {
    "model.embed_tokens": "model.embed_tokens",
    "model.layers.{}.input_layernorm": "model.layers.{}.input_layernorm",
    "model.layers.{}.self_attn.o_proj": "model.layers.{}.self_attn.o_proj",
    "model.layers.{}.post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
    "model.layers.{}.mlp.gate_proj": "model.layers.{}.mlp.gate_proj",
    "model.layers.{}.mlp.up_proj": "model.layers.{}.mlp.up_proj",
    "model.layers.{}.mlp.down_proj": "model.layers.{}.mlp.down_proj",
    "model.norm": "model.norm",
}
# By the size of the vocabulary.
HAS_NORM_HEAD = {64000: False, 125696: True}
ROTARY_WIDTH = 4096


def _rows_of_length_1(weights: Weights) -> Weights:
    return [torch.nn.functional.normalize(weight.to(torch.float32), dim=-1) for weight in weights]


def read(source: Fields) -> Plan:
    """Returns the plan that the config of a Baichuan asks for."""
    fields = source.common(ARCHITECTURES)
    hidden_size = source.size("hidden_size", default=5120)
    if hidden_size == ROTARY_WIDTH:
        raise source.refusal("hidden_size", "this is the width of Baichuan-7B, which is rotary")
    source.only("max_position_embeddings", None, reason="only the rotary Baichuan-7B has this field")
    has_norm_head = source.choice("vocab_size", HAS_NORM_HEAD, default=64000)
    heads = source.size("num_attention_heads", default=40)
    source.only("num_key_value_heads", None, heads, reason="every query head has a key head of its own")
    source.only("hidden_act", "silu", reason="a Baichuan is made with silu")
    source.only("tie_word_embeddings", False, reason="a Baichuan has a head of its own")
    source.only("z_loss_weight", 0, reason="there is no such loss here")
    fields |= {
        "vocab_size": 125696 if has_norm_head else 64000,
        "hidden_size": hidden_size,
        "intermediate_size": source.size("intermediate_size", default=13696),
        "num_hidden_layers": source.size("num_hidden_layers", default=40),
        "num_attention_heads": heads,
        "training_length": source.size("model_max_length", default=4096),
        "norm_eps": source.number("rms_norm_eps", default=1e-6),
        "initializer_range": source.number("initializer_range", default=0.02),
        "use_cache": source.flag("use_cache", default=True),
        "bos_token_id": source.token("bos_token_id", 1),
        "eos_token_id": source.token("eos_token_id", 2),
        "pad_token_id": source.token("pad_token_id", 0),
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "mlp_gated": True,
        "qk_norm": False,
    }
    rules = [Rule(("model.layers.{}.self_attn.W_pack",), QKV, stacked(*[hidden_size] * 3)), *renames(RENAMES)]
    folded, differs = [], []
    if has_norm_head:
        rules.append(Rule(("lm_head",), ("lm_head",), _rows_of_length_1))
        folded.append("The rows of the head are normalised to length 1.")
        differs.append("In training, nothing keeps the rows of the head at length 1.")
    return Plan(fields, rules, folded=folded, differs=differs, reference=reference)


def reference(config: dict[str, Any], read: Read, tokens: Tensor) -> Tensor:
    """Computes Baichuan-13B in float64: from tokens `[length]` to logits `[length, vocab_size]`."""
    heads, eps = config.get("num_attention_heads", 40), config.get("rms_norm_eps", 1e-6)
    states = read("model.embed_tokens.weight")[tokens]
    head_dim = states.shape[-1] // heads
    for layer in range(config.get("num_hidden_layers", 40)):
        block = f"model.layers.{layer}"
        normed = naive.rms_norm(states, read(f"{block}.input_layernorm.weight"), eps)
        packed = normed @ read(f"{block}.self_attn.W_pack.weight").T
        qkv = [part.unflatten(-1, (heads, head_dim)) for part in packed.chunk(3, -1)]
        attended = naive.attention(qkv, naive.slopes(heads), head_dim**-0.5)
        states = states + attended @ read(f"{block}.self_attn.o_proj.weight").T
        normed = naive.rms_norm(states, read(f"{block}.post_attention_layernorm.weight"), eps)
        gate = naive.silu(normed @ read(f"{block}.mlp.gate_proj.weight").T)
        up = normed @ read(f"{block}.mlp.up_proj.weight").T
        states = states + (gate * up) @ read(f"{block}.mlp.down_proj.weight").T
    head = read("lm_head.weight")
    if config.get("vocab_size", 64000) == 125696:
        head = head / head.square().sum(-1, keepdim=True).sqrt()
    return naive.rms_norm(states, read("model.norm.weight"), eps) @ head.T
