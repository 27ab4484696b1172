"""Checkpoints with random weights in the formats of the models that can be converted."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import BloomConfig, FalconConfig, MptConfig, PreTrainedConfig
from transformers.models.auto import AutoModelForCausalLM

VOCAB = 97


def random_weights(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, std: float = 0.2) -> dict[str, Tensor]:
    """Returns weights that are large enough for attention to matter. Those of norms are close to 1."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        weight = std * torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith("weight")
        weights[name] = (1 + weight if is_norm else weight).to(dtype)
    return weights


def save(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], shard_size: int | str = "20KB") -> Path:
    """Saves config and weights as `save_pretrained` does, in several files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def of_transformers(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16, shard_size: str = "20KB"
) -> Path:
    """Saves a model of one of Transformers' classes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    fields = config.to_diff_dict() | {"architectures": [type(model).__name__]}
    return save(folder, fields, random_weights(shapes, dtype), shard_size)


def bloom(folder: Path, heads: int = 6, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    size = {"vocab_size": VOCAB, "hidden_size": 8 * heads, "n_layer": 2, "n_head": heads}
    return of_transformers(folder, BloomConfig(**size | {"pad_token_id": 3} | fields), dtype)


def mpt(folder: Path, heads: int = 6, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    size = {"vocab_size": VOCAB, "d_model": 8 * heads, "n_layers": 2, "n_heads": heads, "max_seq_len": 256}
    return of_transformers(folder, MptConfig(**size | fields), dtype)


def falcon(folder: Path, heads: int = 6, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    size = {"vocab_size": VOCAB, "hidden_size": 8 * heads, "num_hidden_layers": 2, "num_attention_heads": heads}
    rw = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
    return of_transformers(folder, FalconConfig(**size | rw | fields), dtype)


def llm_foundry(folder: Path, heads: int = 6, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    """Saves an MPT with the config of llm-foundry. `attn_config` and `ffn_config` are merged into its own."""
    attn = {
        "attn_type": "multihead_attention", "attn_pdrop": 0.0, "attn_impl": "flash", "qk_ln": False, "qk_gn": False,
        "fused_qkv": True, "clip_qkv": None, "softmax_scale": None, "attn_uses_sequence_id": False,
        "sliding_window_size": -1, "attn_logit_softcapping": None, "alibi": True, "alibi_bias_max": 8, "rope": False,
        "rope_theta": 10000, "rope_impl": "dail", "rope_dail_config": {"type": "original"},
        "rope_hf_config": {"type": "no_scaling", "factor": 1.0}, "kv_dim": None,
    } | fields.pop("attn_config", {})  # fmt: skip
    ffn = {"ffn_type": "mptmlp"} | fields.pop("ffn_config", {})
    config: dict[str, Any] = {
        "architectures": ["MPTForCausalLM"], "model_type": "mpt", "d_model": 8 * heads, "n_heads": heads,
        "n_layers": 2, "expansion_ratio": 4, "max_seq_len": 256, "vocab_size": VOCAB, "resid_pdrop": 0.0,
        "emb_pdrop": 0.0, "learned_pos_emb": False, "attn_config": attn, "ffn_config": ffn, "init_device": "cpu",
        "logit_scale": None, "no_bias": True, "embedding_fraction": 1.0, "norm_type": "low_precision_layernorm",
        "use_cache": False, "init_config": {"name": "kaiming_normal_"}, "fc_type": {"name": "torch"},
        "tie_word_embeddings": True, "use_pad_tok_in_ffn": True, "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"}, "transformers_version": "4.46.0",
    } | fields  # fmt: skip
    width = config["d_model"]
    key_heads = 1 if attn["attn_type"] == "multiquery_attention" else attn.get("kv_n_heads", heads)
    inner = ffn.get("ffn_hidden_size", int(config["expansion_ratio"] * width))
    linears, norms = {}, ["norm_f"]
    for block in (f"blocks.{layer}" for layer in range(2)):
        norms += [f"{block}.norm_1", f"{block}.norm_2"]
        if attn["fused_qkv"]:
            linears[f"{block}.attn.Wqkv"] = (width + 2 * key_heads * 8, width)
        else:
            linears[f"{block}.attn.Wq"] = (width, width)
            linears |= {f"{block}.attn.W{name}": (key_heads * 8, width) for name in "kv"}
        linears |= {f"{block}.attn.out_proj": (width, width), f"{block}.ffn.down_proj": (width, inner)}
        linears |= {f"{block}.ffn.{name}": (inner, width) for name in _ups(ffn)}
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (VOCAB, width)}
    shapes |= {f"transformer.{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"transformer.{name}.weight": (width,) for name in norms}
    if not config["no_bias"]:
        shapes |= {f"transformer.{name}.bias": shape[:1] for name, shape in linears.items()}
        if "layernorm" in config["norm_type"]:
            shapes |= {f"transformer.{name}.bias": (width,) for name in norms}
    return save(folder, config, random_weights(shapes, dtype))


def _ups(ffn: dict[str, Any]) -> list[str]:
    return ["up_proj", "gate_proj"] if ffn["ffn_type"] == "mptglu" else ["up_proj"]


def baichuan(folder: Path, heads: int = 40, dtype: torch.dtype = torch.bfloat16, vocab: int = 64000) -> Path:
    """Saves a Baichuan-13B, or with a vocabulary of 125,696 a Baichuan2-13B."""
    width, inner = 2 * heads, 5 * heads
    config = {
        "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "hidden_act": "silu", "hidden_size": width, "initializer_range": 0.02,
        "intermediate_size": inner, "model_max_length": 4096, "num_attention_heads": heads, "num_hidden_layers": 2,
        "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": vocab, "_from_model_config": True, "gradient_checkpointing": False, "z_loss_weight": 0,
        "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"}, "tokenizer_class": "BaichuanTokenizer",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    for block in (f"model.layers.{layer}" for layer in range(2)):
        shapes |= {
            f"{block}.self_attn.W_pack.weight": (3 * width, width),
            f"{block}.self_attn.o_proj.weight": (width, width),
            f"{block}.mlp.gate_proj.weight": (inner, width),
            f"{block}.mlp.up_proj.weight": (inner, width),
            f"{block}.mlp.down_proj.weight": (width, inner),
            f"{block}.input_layernorm.weight": (width,),
            f"{block}.post_attention_layernorm.weight": (width,),
        }
    return save(folder, config, random_weights(shapes, dtype), "5MB")


def jais(folder: Path, heads: int = 6, dtype: torch.dtype = torch.bfloat16, kind: str = "jais", **fields: Any) -> Path:
    """Saves a JAIS, or a BTLM, which has the same names."""
    width = 8 * heads
    inner = fields.get("n_inner", 5 * heads)
    config = {
        "architectures": [f"{kind.upper()}LMHeadModel"], "model_type": kind, "activation_function": "swiglu",
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "mup_embeddings_scale": 14.6,
        "mup_output_alpha": 2.22, "mup_scale_qk_dot_by_d": True, "mup_width_scale": 0.1, "n_embd": width,
        "n_head": heads, "n_inner": inner, "n_layer": 2, "n_positions": 2048, "position_embedding_type": "alibi",
        "reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True,
        "torch_dtype": "float32", "transformers_version": "4.30.0", "use_cache": True, "vocab_size": VOCAB,
        "auto_map": {"AutoConfig": f"configuration_{kind}.{kind.upper()}Config"}, "alibi_scaling": None,
    } | fields  # fmt: skip
    config = {name: value for name, value in config.items() if value != "absent"}
    # Embeddings are small, because their multiplier is large.
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (VOCAB, width)}
    linears = {}
    for block in (f"h.{layer}" for layer in range(2)):
        linears |= {
            f"{block}.attn.c_attn": (width, 3 * width),  # Conv1D: [inputs, outputs]
            f"{block}.attn.c_proj": (width, width),
            f"{block}.mlp.c_fc": (width, inner),
            f"{block}.mlp.c_proj": (inner, width),
        }
        if config["activation_function"] == "swiglu":
            linears[f"{block}.mlp.c_fc2"] = (width, inner)
        shapes |= {f"transformer.{block}.ln_{n}.{part}": (width,) for n in (1, 2) for part in ("weight", "bias")}
    shapes |= {f"transformer.ln_f.{part}": (width,) for part in ("weight", "bias")}
    shapes |= {f"transformer.{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"transformer.{name}.bias": shape[1:] for name, shape in linears.items()}
    weights = random_weights(shapes, dtype)
    return save(folder, config, weights | {"transformer.relative_pe.slopes": paper_slopes(heads).to(dtype)[:, None]})


def paper_slopes(heads: int) -> Tensor:
    from oracle import paper_slopes as formula

    return torch.tensor(formula(heads))


def btlm(folder: Path, heads: int = 6, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    return jais(folder, heads, dtype, "btlm", **fields)


def refact(folder: Path, heads: int = 6, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    width = 8 * heads
    config = {
        "architectures": ["GPTRefactForCausalLM"], "model_type": "gpt_refact", "attention_bias_in_fp32": True,
        "attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True, "do_sample": True,
        "eos_token_id": 0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "multi_query": True,
        "n_embd": width, "n_head": heads, "n_inner": None, "n_layer": 2, "n_positions": 4096,
        "torch_dtype": "bfloat16", "transformers_version": "4.31.0", "use_cache": True, "vocab_size": VOCAB,
    } | fields  # fmt: skip
    inner = -(-(2 * 4 * width // 3) // 256) * 256
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB, width),
        "ln_f.weight": (width,),
        "lm_head.weight": (VOCAB, width),
    }
    for block in (f"transformer.h.{layer}" for layer in range(2)):
        shapes |= {
            f"{block}.ln_1.weight": (width,),
            f"{block}.ln_2.weight": (width,),
            f"{block}.attn.q.weight": (width, width),
            f"{block}.attn.kv.weight": (16, width),
            f"{block}.attn.c_proj.weight": (width, width),
            f"{block}.mlp.gate_up_proj.weight": (2 * inner, width),
            f"{block}.mlp.c_proj.weight": (width, inner),
        }
    return save(folder, config, random_weights(shapes, dtype))
