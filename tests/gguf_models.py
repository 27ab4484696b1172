"""A model of ours for each architecture of llama.cpp, with the tokenizer that training makes."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM

LAYER_NORM = {"norm_type": "layernorm", "norm_bias": True, "attention_bias": True, "mlp_bias": True}
SWIGLU = {"mlp_gated": True, "hidden_act": "silu"}
TANH_GELU = {"hidden_act": "gelu_pytorch_tanh"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "jais": ("jais", LAYER_NORM | SWIGLU),
    "jais-without-biases": (
        "jais",
        SWIGLU | {"norm_type": "layernorm", "alibi_max_bias": 16, "num_key_value_heads": 2, "norm_eps": 1e-5},
    ),
    "refact": ("refact", SWIGLU),
    "refact-with-a-head": ("refact", SWIGLU | {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "mpt": ("mpt", TANH_GELU | {"norm_type": "layernorm", "clip_qkv": 1.0, "alibi_max_bias": 12}),
    "mpt-with-biases": ("mpt", LAYER_NORM | TANH_GELU | {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "mpt-exact-gelu": ("mpt", {"norm_type": "layernorm", "hidden_act": "gelu"}),
    "bloom": ("bloom", LAYER_NORM | TANH_GELU | {"embedding_norm": True}),
    "bloom-without-biases": (
        "bloom",
        TANH_GELU | {"norm_type": "layernorm", "embedding_norm": True, "num_key_value_heads": 2},
    ),
}


def save_model(
    folder: Path,
    fields: dict[str, Any],
    heads: int = 6,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> AlibiGPTForCausalLM:
    """Saves a model of two layers with `tokenizer` in `folder`; its norms and biases are not what they begin as."""
    tokenizer = tokenizer or tiny_tokenizer()
    shape = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 16 * heads,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "qk_norm": False,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = AlibiGPTForCausalLM(AlibiGPTConfig(**shape | fields)).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            torch.nn.init.normal_(weight, float(name.endswith("weight")), 0.1)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
