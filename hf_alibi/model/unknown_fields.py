"""Warnings about config fields that the model does not have.

Transformers stores every field that a config is given, known or not. Without a warning, a misspelt field or a field of
another model would silently have no effect.
"""

import difflib
import warnings
from collections.abc import Iterable
from dataclasses import fields

from transformers import GenerationConfig

BOOKKEEPING = frozenset(
    {
        # Arguments that every config in Transformers accepts, but that are no dataclass fields.
        "attn_implementation",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "torch_dtype",
        "use_return_dict",
        # Entries that Transformers and related libraries write into a saved config.
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
"""Names that other models use for the fields of this config."""

FIELD_OF = {name: field for field, names in OTHER_NAMES.items() for name in names}


def warn_of_unknown_fields(config_class: type, given: Iterable[str]) -> None:
    """Warns about names that are no fields of `config_class`, and suggests the nearest field for each.

    Args:
        config_class: A dataclass.
        given: Names that a config was given in addition to its fields.
    """
    # A model moves generation parameters to its generation config.
    bookkeeping = BOOKKEEPING | GenerationConfig().to_dict().keys()
    unknown = sorted(name for name in given if name not in bookkeeping and not name.startswith("_"))
    if not unknown:
        return
    nearest = {name: nearest_field(config_class, name) for name in unknown}
    hints = [f"{name} (did you mean {field}?)" if field else name for name, field in nearest.items()]
    warnings.warn(
        f"{config_class.__name__} has no field {', '.join(hints)}. "
        "Unknown fields have no effect; correct or remove them.",
        UserWarning,
        stacklevel=2,
    )


def nearest_field(config_class: type, name: str, similarity: float = 0.6) -> str | None:
    """Returns the field whose name, or name in other models, is most similar to `name`, or `None`.

    Args:
        config_class: A dataclass.
        name: An unknown name.
        similarity: Minimum similarity, from 0 to 1.
    """
    known = {field.name: field.name for field in fields(config_class)} | FIELD_OF
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=similarity)
    return known[nearest[0]] if nearest else None
