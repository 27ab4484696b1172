"""What a config says of fields that its model does not have.

Transformers keeps any name that a config is given as an attribute. A field that is misspelt, or that belongs to
another model, would change nothing, without a word.
"""

import difflib
import warnings
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig

BOOKKEEPING = frozenset(
    {
        # Arguments of every config in Transformers that are no fields of it.
        "attn_implementation",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "torch_dtype",
        "use_return_dict",
        # What Transformers and libraries around it write into a saved config.
        "auto_map",
        "base_model_name_or_path",
        "compression_config",
        "custom_pipelines",
        "device_map",
        "distributed_config",
        "finetuning_task",
        "hf_device_map",
        "library_name",
        "peft_config",
        "quantization",
        "quantization_config",
        "sparsity_config",
        "task_specific_params",
        "tie_last_hidden_states",
        "tokenizer_class",
        "transformers.js_config",
        "transformers_weights",
        "unsloth_fixed",
        "unsloth_version",
    }
)

OTHER_NAMES = {
    "training_length": ("n_positions", "n_ctx", "max_seq_len", "max_seq_length", "max_sequence_length", "seq_length"),
    "hidden_size": ("n_embd", "d_model", "embed_dim", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "kv_n_heads", "num_kv_heads"),
    "intermediate_size": ("n_inner", "d_ff", "ffn_dim", "ffn_hidden_size"),
    "hidden_act": ("activation_function", "hidden_activation", "act_fn"),
    "norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"),
    "alibi_max_bias": ("alibi_bias_max",),
    "attention_dropout": ("attn_pdrop", "attn_dropout"),
    "hidden_dropout": ("resid_pdrop", "embd_pdrop", "dropout"),
}
"""What other models call the fields of this one."""

FIELD_OF = {name: field for field, names in OTHER_NAMES.items() for name in names}


def warn_of_unknown_fields(config: Any, given: dict[str, Any]) -> None:
    """Warns of the names in `given` that are no fields of `config`, each with the nearest field.

    Args:
        config: A dataclass.
        given: What the config was given beside its fields.
    """
    bookkeeping = BOOKKEEPING | GenerationConfig().to_dict().keys()  # a model takes those to its generation config
    unknown = sorted(name for name in given if name not in bookkeeping and not name.startswith("_"))
    if not unknown:
        return
    known = {field.name: field.name for field in fields(config)} | FIELD_OF
    hints = []
    for name in unknown:
        nearest = difflib.get_close_matches(name, known, n=1)
        hints.append(f"{name} (did you mean {known[nearest[0]]}?)" if nearest else name)
    warnings.warn(
        f"{type(config).__name__} has no field {', '.join(hints)}: given, but without effect.",
        UserWarning,
        stacklevel=2,
    )
