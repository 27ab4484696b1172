"""The architectures of llama.cpp that have ALiBi: what each computes, its names, and its formula.

No model of ours fits two of them:

| architecture | norm | feed-forward layer | biases | besides |
| --- | --- | --- | --- | --- |
| `jais` | LayerNorm | SwiGLU | all | scores are divided by head_dim, so queries are multiplied by its root |
| `refact` | RMSNorm | SwiGLU | none | `alibi_max_bias` is 8 |
| `mpt` | LayerNorm | GELU | any | `clip_qkv` |
| `bloom` | LayerNorm, also after the embedding | GELU | all | `alibi_max_bias` is 8 |

Source: github.com/ggml-org/llama.cpp, `src/models/` and `src/llama-vocab.cpp`, in the autumn of 2026. It computes the
slopes of the paper from `alibi_max_bias` alone. Its GELU is the tanh formula, from a table in half precision.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..model.configuration_alibi_gpt import AlibiGPTConfig
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM
from . import naive
from .fields import LOSSLESS, Fields, shown
from .rules import QKV, Plan, Rule, joined, renames, scaled

TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
RENAMES = {
    "token_embd": "model.embed_tokens",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
    "output_norm": "model.norm",
}
GATE = {"blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj"}
EMBEDDING_NORM = {"token_embd_norm": "model.embedding_norm"}
SPLIT = {f"blk.{{}}.attn_{letter}": name for letter, name in zip("qkv", QKV, strict=True)}
FUSED = "blk.{}.attn_qkv"
REASONS = {
    "qk_norm": "it has no norm over the queries and keys of each head together with ALiBi",
    "alibi_slopes": "it computes the slopes itself",
    "alibi_slopes_trainable": "it computes the slopes itself",
    "alibi_scaling": "it computes the slopes itself",
    "window_tolerance": "it looks at every key",
}


@dataclass(frozen=True)
class Architecture:
    """What an architecture of llama.cpp computes.

    Attributes:
        name: There.
        trained_with: Fields of our config with the values that it computes, the one to train with first.
        has_biases: Whether its layers have biases; `None` if they may.
    """

    name: str
    trained_with: dict[str, tuple[Any, ...]]
    has_biases: bool | None


NO_BIASES: dict[str, tuple[Any, ...]] = {"attention_bias": (False,), "mlp_bias": (False,)}
GATED: dict[str, tuple[Any, ...]] = {"mlp_gated": (True,), "hidden_act": ("silu", "swish")}
PLAIN: dict[str, tuple[Any, ...]] = {"mlp_gated": (False,), "hidden_act": (*TANH_GELU, "gelu")}
EIGHT: dict[str, tuple[Any, ...]] = {"alibi_max_bias": (8,)}


def _norms(norm_type: str, after_embedding: bool = False) -> dict[str, tuple[Any, ...]]:
    return {"norm_type": (norm_type,), "embedding_norm": (after_embedding,)}


NO_CLIP: dict[str, tuple[Any, ...]] = {"clip_qkv": (None,)}
ARCHITECTURES = [
    Architecture("jais", _norms("layernorm") | GATED | NO_CLIP, has_biases=True),
    Architecture("refact", _norms("rmsnorm") | GATED | NO_CLIP | NO_BIASES | EIGHT, has_biases=False),
    Architecture("mpt", _norms("layernorm") | PLAIN, has_biases=None),
    Architecture("bloom", _norms("layernorm", after_embedding=True) | PLAIN | NO_CLIP | EIGHT, has_biases=True),
]


def _computed(architecture: Architecture, config: AlibiGPTConfig) -> dict[str, tuple[Any, ...]]:
    """The values that the architecture computes, of every field of `config` that is not free there."""
    return architecture.trained_with | {
        "qk_norm": (False,),
        "head_dim": (config.hidden_size // config.num_attention_heads,),
        "alibi_slopes": (None,),
        "alibi_slopes_trainable": (False,),
        "alibi_scaling": (None,),
        "use_parallel_residual": (False,),
        "window_tolerance": (min(config.window_tolerance, LOSSLESS),),
    }


def choose(config: AlibiGPTConfig) -> Architecture:
    """The architecture that computes the model of this config.

    Raises:
        UserError: If there is none. It says what one would train instead for those that are nearest, and why.
    """
    misfits = {}
    for architecture in ARCHITECTURES:
        computed = _computed(architecture, config)
        found = {name: values[0] for name, values in computed.items() if getattr(config, name) not in values}
        if not found:
            return architecture
        misfits[architecture.name] = found
    least = min(map(len, misfits.values()))
    nearest = {name: found for name, found in misfits.items() if len(found) == least}
    needs = [
        f"{name} needs one trained with "
        + ", ".join(f"{field}={value!r} (here {shown(getattr(config, field))})" for field, value in found.items())
        for name, found in nearest.items()
    ]
    reasons = {field: REASONS[field] for found in nearest.values() for field in found if field in REASONS}
    because = "".join(f". As to {field}, {reason}" for field, reason in reasons.items())
    raise UserError(f"llama.cpp has no architecture that computes this model: {', or '.join(needs)}{because}")


def write(config: AlibiGPTConfig, ours: Fields) -> tuple[Architecture, Plan]:
    """The architecture that holds the model, and the metadata and the weights of its file; refuses what none holds."""
    architecture = choose(config)
    ours.common(("AlibiGPTForCausalLM",))
    for name in _computed(architecture, config):
        ours.value(name)
    # Without QK-norm it means nothing.
    ours.value("qk_norm_gain")
    # The weights in the file say this.
    for name in ("attention_bias", "mlp_bias", "norm_bias", "tie_word_embeddings"):
        ours.flag(name)
    # llama.cpp does not train, and always has a cache.
    for name in ("hidden_dropout", "attention_dropout", "initializer_range", "use_cache"):
        ours.value(name)
    # These are written with the tokenizer.
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        ours.value(name)
    name = architecture.name
    epsilon = "layer_norm_rms_epsilon" if config.norm_type == "rmsnorm" else "layer_norm_epsilon"
    fields: dict[str, Any] = {
        "general.architecture": name,
        f"{name}.context_length": ours.size("training_length"),
        f"{name}.embedding_length": ours.size("hidden_size"),
        f"{name}.block_count": ours.size("num_hidden_layers"),
        f"{name}.feed_forward_length": ours.size("intermediate_size"),
        f"{name}.attention.head_count": ours.size("num_attention_heads"),
        f"{name}.attention.head_count_kv": ours.size("num_key_value_heads"),
        f"{name}.attention.{epsilon}": float(ours.number("norm_eps")),
        f"{name}.attention.max_alibi_bias": float(ours.number("alibi_max_bias")),
    }
    clip = ours.number("clip_qkv", default=None)
    if clip is not None:
        fields[f"{name}.attention.clamp_kqv"] = float(clip)
    plan = Plan(fields, _rules(architecture, config))
    if architecture.name == "jais":
        # Multiplying by a power of two rounds nothing.
        is_exact = math.frexp(math.sqrt(config.head_dim))[0] == 0.5
        (plan.differs if is_exact else plan.folded).append(
            f"The queries hold sqrt({config.head_dim}), since `jais` divides scores by head_dim."
        )
    if config.hidden_act == "gelu":
        plan.differs.append("llama.cpp computes GELU by its tanh formula.")
    return architecture, plan


def _rules(architecture: Architecture, config: AlibiGPTConfig) -> list[Rule]:
    rules = renames(RENAMES | (GATE if config.mlp_gated else {}) | (EMBEDDING_NORM if config.embedding_norm else {}))
    if architecture.name == "refact":
        rules += renames(SPLIT)
    else:
        factor = math.sqrt(config.head_dim) if architecture.name == "jais" else 1.0
        # Multiplies the first of three: the queries.
        fold = scaled(factor)
        rules.append(Rule((FUSED,), QKV, back=lambda weights: joined(fold(weights))))
    if not config.tie_word_embeddings:
        rules.append(Rule(("output",), ("lm_head",)))
    elif architecture.name == "jais":
        # There, the head is always a matrix of its own.
        rules.append(Rule(("output",), ("model.embed_tokens",)))
    return rules


def shapes(architecture: Architecture, plan: Plan, config: AlibiGPTConfig) -> dict[str, Tensor]:
    """The tensors of the file, on the meta device."""
    biases = {"attention_bias": True, "mlp_bias": True, "norm_bias": True} if architecture.has_biases else {}
    full = copy.deepcopy(config)
    full.update(biases)
    with torch.device("meta"):
        weights = AlibiGPTForCausalLM(full).state_dict()
    found: dict[str, Tensor] = {}
    for rule in plan.rules:
        for layer in range(config.num_hidden_layers) if rule.is_of_layer else [0]:
            for suffix in ("weight", "bias"):
                names = [f"{name.format(layer)}.{suffix}" for name in rule.ours]
                if all(name in weights for name in names):
                    theirs = [f"{name.format(layer)}.{suffix}" for name in rule.theirs]
                    found |= zip(theirs, rule.back([weights[name] for name in names]), strict=True)
    return found


def reference(metadata: Mapping[str, Any], weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The formula of the four architectures in float64: `[length]` tokens to `[length, vocab_size]` logits.

    Args:
        metadata: Of the file.
        weights: Of the file, in float64.
        tokens: `[length]`.
    """
    name = metadata["general.architecture"]

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{name}.{key}", default)

    def linear(module: str, states: Tensor) -> Tensor:
        return states @ weights[f"{module}.weight"].T + weights.get(f"{module}.bias", torch.zeros(()))

    def norm(module: str, states: Tensor) -> Tensor:
        weight = weights[f"{module}.weight"]
        if name == "refact":
            return naive.rms_norm(states, weight, value("attention.layer_norm_rms_epsilon"))
        return naive.layer_norm(states, weight, weights.get(f"{module}.bias"), value("attention.layer_norm_epsilon"))

    heads, key_heads = value("attention.head_count"), value("attention.head_count_kv")
    limit = value("attention.clamp_kqv", math.inf)
    slope = naive.slopes(heads, value("attention.max_alibi_bias"))
    states = weights["token_embd.weight"][tokens]
    head_dim = states.shape[-1] // heads
    if name == "bloom":
        states = norm("token_embd_norm", states)
    for block in (f"blk.{layer}" for layer in range(value("block_count"))):
        normed = norm(f"{block}.attn_norm", states)
        if name == "refact":
            qkv = torch.cat([linear(f"{block}.attn_{letter}", normed) for letter in "qkv"], -1)
        else:
            qkv = linear(f"{block}.attn_qkv", normed).clamp(-limit, limit)
        heads_of = qkv.unflatten(-1, (-1, head_dim)).split([heads, key_heads, key_heads], 1)
        attended = naive.attention(heads_of, slope, 1 / head_dim if name == "jais" else head_dim**-0.5)
        states = states + linear(f"{block}.attn_output", attended)
        normed = norm(f"{block}.ffn_norm", states)
        inner = linear(f"{block}.ffn_up", normed)
        if name in ("jais", "refact"):
            inner = inner * naive.silu(linear(f"{block}.ffn_gate", normed))
        else:
            inner = F.gelu(inner, approximate="tanh")
        states = states + linear(f"{block}.ffn_down", inner)
    head = weights["output.weight" if "output.weight" in weights else "token_embd.weight"]
    return norm("output_norm", states) @ head.T
