"""BLOOM and BLOOMZ (`bloom` in Transformers; Le Scao et al., arXiv 2211.05100).

BLOOM has LayerNorm with bias, also after the embedding, biases in all linear layers, and GELU by its tanh formula.
Queries, keys and values are in one matrix, with rows `[head, 3, head_dim]`.
"""

from ..model.configuration_alibi_gpt import AlibiGPTConfig
from .fields import LOSSLESS, Fields
from .rules import QKV, Plan, Rule, interleaved, interleaved_back, renames

ARCHITECTURES = ("BloomForCausalLM", "BloomModel")
PREFIX = "transformer."
RENAMES = {
    "word_embeddings": "model.embed_tokens",
    "word_embeddings_layernorm": "model.embedding_norm",
    "h.{}.input_layernorm": "model.layers.{}.input_layernorm",
    "h.{}.self_attention.dense": "model.layers.{}.self_attn.o_proj",
    "h.{}.post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
    "h.{}.mlp.dense_h_to_4h": "model.layers.{}.mlp.up_proj",
    "h.{}.mlp.dense_4h_to_h": "model.layers.{}.mlp.down_proj",
    "ln_f": "model.norm",
}
# Of all published models. Not all of their configs state it.
TRAINING_LENGTH = 2048


def _rules(heads: int, head_dim: int) -> list[Rule]:
    fused = interleaved(heads, head_dim), interleaved_back(heads, head_dim)
    return [Rule(("h.{}.self_attention.query_key_value",), QKV, *fused), *renames(RENAMES)]


def read(source: Fields) -> Plan:
    """Returns the plan that the config of a BLOOM asks for."""
    fields = source.common(ARCHITECTURES)
    heads = source.size("n_head", "num_attention_heads", default=8)
    fields |= {
        "vocab_size": source.size("vocab_size", default=250880),
        "hidden_size": source.size("hidden_size", "n_embed", default=64),
        "num_hidden_layers": source.size("n_layer", "num_hidden_layers", default=2),
        "num_attention_heads": heads,
        "training_length": source.size("seq_length", default=TRAINING_LENGTH),
        "norm_eps": source.number("layer_norm_epsilon", default=1e-5),
        "hidden_dropout": source.number("hidden_dropout", default=0.0),
        "attention_dropout": source.number("attention_dropout", default=0.0),
        "initializer_range": source.number("initializer_range", default=0.02),
        "use_cache": source.flag("use_cache", default=True),
        "tie_word_embeddings": source.flag("tie_word_embeddings", default=True),
        "bos_token_id": source.token("bos_token_id", 1),
        "eos_token_id": source.token("eos_token_id", 2),
        "pad_token_id": source.token("pad_token_id"),
        "hidden_act": "gelu_pytorch_tanh",
        "norm_type": "layernorm",
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "embedding_norm": True,
        "qk_norm": False,
    }
    source.only(
        "apply_residual_connection_post_layernorm", False, reason="here the residual stream does not pass the norms"
    )
    source.only("n_inner", None, 4 * fields["hidden_size"], reason="BLOOM's feed-forward layer is 4 hidden_size wide")
    source.only("skip_bias_add_qkv", False, reason="the projections of the attention have biases here")
    source.neutral("pretraining_tp", int)
    # These change how sums are computed (in slices, fused, in float32), not what they are.
    for name in ("slow_but_exact", "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion"):
        source.neutral(name, bool)
    source.neutral("skip_bias_add", bool)
    source.neutral("offset_alibi", int)
    # DeepSpeed-Chat writes it, and no BLOOM reads it.
    source.neutral("dropout", float, int)
    differs = []
    if fields["hidden_dropout"]:
        differs.append("In training, hidden_dropout also drops embeddings here.")
    if fields["pad_token_id"] is not None:
        differs.append("In training, the embedding of the padding token is not changed.")
    return Plan(
        fields,
        _rules(heads, fields["hidden_size"] // heads),
        prefix=PREFIX,
        differs=differs,
    )


def write(config: AlibiGPTConfig, ours: Fields) -> Plan:
    """Returns the plan for the equal BLOOM.

    Raises:
        UserError: If no BLOOM computes the same. It names the value that the field should have in training.
    """
    fields = ours.common(("AlibiGPTForCausalLM",))
    wanted = {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "intermediate_size": 4 * config.hidden_size,
        "mlp_gated": False,
        "alibi_max_bias": 8,
        "alibi_slopes": None,
        "alibi_slopes_trainable": False,
        "alibi_scaling": None,
        "qk_norm": False,
        "clip_qkv": None,
        "norm_type": "layernorm",
        "embedding_norm": True,
        "use_parallel_residual": False,
        "hidden_act": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"),
        "window_tolerance": min(config.window_tolerance, LOSSLESS),
    }
    ours.trained_with("a BLOOM", wanted)
    # Without QK-norm it means nothing.
    ours.value("qk_norm_gain")
    for name in ("attention_bias", "mlp_bias", "norm_bias"):
        # A missing bias becomes zero.
        ours.flag(name)
    fields |= {
        "vocab_size": ours.size("vocab_size"),
        "hidden_size": ours.size("hidden_size"),
        "n_layer": ours.size("num_hidden_layers"),
        "n_head": ours.size("num_attention_heads"),
        "layer_norm_epsilon": ours.number("norm_eps"),
        "hidden_dropout": ours.number("hidden_dropout"),
        "attention_dropout": ours.number("attention_dropout"),
        "initializer_range": ours.number("initializer_range"),
        "use_cache": ours.flag("use_cache"),
        "tie_word_embeddings": ours.flag("tie_word_embeddings"),
        "bos_token_id": ours.token("bos_token_id"),
        "eos_token_id": ours.token("eos_token_id"),
        "pad_token_id": ours.token("pad_token_id"),
    }
    length = ours.size("training_length")
    if length != TRAINING_LENGTH:
        fields["seq_length"] = length
    return Plan(fields, _rules(fields["n_head"], fields["hidden_size"] // fields["n_head"]), prefix=PREFIX)
