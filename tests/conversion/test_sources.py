"""Sources in their own formats, with random weights, compute the same after conversion."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conversion_sources as sources
import pytest
import torch
from oracle import paper_slopes
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.falcon import modeling_falcon

from hf_alibi import AlibiGPTConfig
from hf_alibi.conversion import convert
from hf_alibi.conversion.checkpoint import Checkpoint
from hf_alibi.conversion.convert import SOURCES
from hf_alibi.conversion.fields import Fields
from hf_alibi.conversion.table import plain_names
from hf_alibi.model.cache_names import CACHE_NAME

LENGTH = 150
GQA = {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "clip_qkv": 1.0, "alibi_bias_max": 16}
SWIGLU = {"ffn_type": "mptglu", "ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 80}
Case = Callable[[Path], Path]


def case(source: Callable[..., Path], heads: int, **fields: Any) -> Case:
    return lambda folder: source(folder, heads, **fields)


OWN_CLASS: dict[str, Case] = {
    **{f"bloom-{heads}": case(sources.bloom, heads) for heads in (6, 8, 12)},
    "bloom-112": case(sources.bloom, 112, hidden_size=224),
    "bloom-with-a-head": case(sources.bloom, 6, tie_word_embeddings=False, pad_token_id=None),
    **{f"mpt-{heads}": case(sources.mpt, heads) for heads in (6, 8, 12)},
    "mpt-112": case(sources.mpt, 112, d_model=224),
    "mpt-clipped": case(sources.mpt, 8, attn_config={"clip_qkv": 0.7}),
    "mpt-scaled": case(sources.mpt, 8, attn_config={"softmax_scale": 0.3}),
}
FALCONS: dict[str, Case] = {
    **{f"falcon-rw-{heads}": case(sources.falcon, heads) for heads in (6, 8, 12)},
    "falcon-rw-71": case(sources.falcon, 71, hidden_size=284),
    "falcon-multi-query": case(sources.falcon, 71, hidden_size=142, multi_query=True, ffn_hidden_size=100),
    "falcon-parallel": case(sources.falcon, 12, parallel_attn=True, bias=False),
    "falcon-new": case(sources.falcon, 8, new_decoder_architecture=True, num_kv_heads=2, parallel_attn=True),
    "falcon-new-one-norm": case(
        sources.falcon,
        12,
        new_decoder_architecture=True,
        num_kv_heads=4,
        parallel_attn=True,
        num_ln_in_parallel_attn=1,
    ),
}
FORMULAS: dict[str, Case] = {
    "llm-foundry-6": case(sources.llm_foundry, 6),
    "llm-foundry-grouped-swiglu": case(
        sources.llm_foundry, 8, no_bias=False, logit_scale="inv_sqrt_d_model", attn_config=GQA, ffn_config=SWIGLU
    ),
    "llm-foundry-multi-query-rmsnorm": case(
        sources.llm_foundry,
        12,
        norm_type="rmsnorm",
        expansion_ratio=3,
        attn_config={"attn_type": "multiquery_attention", "fused_qkv": False, "softmax_scale": 0.2},
    ),
    "baichuan-40": case(sources.baichuan, 40),
    "baichuan2-40": case(sources.baichuan, 40, vocab=125696),
    **{f"jais-{heads}": case(sources.jais, heads) for heads in (6, 8, 12, 40)},
    "jais-13b-names": case(
        sources.jais,
        40,
        embeddings_scale=14.6,
        width_scale=0.11,
        scale_qk_dot_by_d=True,
        **dict.fromkeys(["mup_embeddings_scale", "mup_width_scale", "mup_output_alpha"], "absent"),
        mup_scale_qk_dot_by_d="absent",
    ),
    "jais-gelu-without-mup": case(
        sources.jais,
        8,
        activation_function="gelu_new",
        n_inner=200,
        **dict.fromkeys(["mup_embeddings_scale", "mup_width_scale", "mup_output_alpha"], 1.0),
        mup_scale_qk_dot_by_d=False,
    ),
    "jais-dynamic": case(sources.jais, 12, alibi_scaling={"type": "linear", "train_seq_len": 60}),
    **{f"btlm-{heads}": case(sources.btlm, heads) for heads in (6, 8, 32)},
    "btlm-linear": case(sources.btlm, 12, alibi_scaling={"type": "linear", "factor": 4.0}),
    **{f"refact-{heads}": case(sources.refact, heads) for heads in (6, 8, 12, 32)},
}


def tokens() -> Tensor:
    return torch.randint(4, 97, (LENGTH,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor, way: str) -> Tensor:
    """Returns the logits of a text, `[LENGTH, vocab_size]`: at once, after padding in a batch, or token by token."""
    if way == "full":
        return model(ids[None]).logits[0]
    if way == "padded":
        batch = torch.stack([torch.cat([torch.full((19,), 3), ids]), torch.cat([ids[:19], ids])])
        mask = torch.ones_like(batch)
        mask[0, :19] = 0
        return model(batch, attention_mask=mask).logits[0, 19:]
    cache = DynamicCache(config=model.config)
    pieces = [ids[:100], *ids[100:].split(1)]
    return torch.cat([model(piece[None], **{CACHE_NAME: cache}).logits[0] for piece in pieces])


def assert_same(model: PreTrainedModel, ids: Tensor, expected: dict[str, Tensor] | Tensor, tolerance: float) -> None:
    for way in ("full", "padded", "cached"):
        if way != "full" and getattr(model.config, "slopes_depend_on_length", False):
            # Dynamic slopes depend on the length of the pass, so pieces and padded batches have others.
            continue
        there = expected if isinstance(expected, Tensor) else expected[way]
        error = (logits_of(model, ids, way) - there).abs().max() / there.abs().max()
        assert error < tolerance, (way, error)


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def formula(folder: Path, ids: Tensor) -> Tensor:
    """Returns the logits of the source's formula in float64."""
    checkpoint = Checkpoint(folder)
    plan = SOURCES[checkpoint.config["model_type"]][1](Fields(checkpoint.config, "it"))
    names = plain_names(checkpoint.files, plan.prefix)
    assert plan.reference is not None
    return plan.reference(checkpoint.config, lambda name: checkpoint[names[name]].double(), ids)


@pytest.mark.parametrize("name", OWN_CLASS)
def test_it_computes_what_transformers_class_does(tmp_path: Path, name: str) -> None:
    source = OWN_CLASS[name](tmp_path / "source")
    assert len(list(source.glob("*.safetensors"))) > 1
    convert(source, tmp_path / "ours")
    theirs = loaded(source)
    expected = {way: logits_of(theirs, tokens(), way) for way in ("full", "padded", "cached")}
    assert_same(loaded(tmp_path / "ours"), tokens(), expected, 1e-5)


@pytest.mark.parametrize("name", FALCONS)
def test_a_falcon_computes_what_its_class_does_with_a_bias_in_float32(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FALCONS[name](tmp_path / "source")
    convert(source, tmp_path / "ours")
    theirs, ours = loaded(source), loaded(tmp_path / "ours")
    rounded = logits_of(theirs, tokens(), "full")

    def bias_in_float32(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        places = (attention_mask.cumsum(-1) - 1) * attention_mask  # [batch, length]
        bias = torch.tensor(paper_slopes(num_heads))[:, None] * places[:, None]
        return bias.reshape(-1, 1, places.shape[1]).to(dtype)

    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", bias_in_float32)
    expected = {way: logits_of(theirs, tokens(), way) for way in ("full", "padded", "cached")}
    assert_same(ours, tokens(), expected, 1e-5)
    assert_same(ours, tokens(), formula(source, tokens()), 1e-5)
    # The class rounds the bias. That changes nothing if slopes are powers of two and the text is short.
    reported = json.loads((tmp_path / "ours" / "conversion.json").read_text())["verification"]["other"]
    assert set(reported) == {"Transformers' FalconForCausalLM"}
    if name == "falcon-rw-71":
        assert reported["Transformers' FalconForCausalLM"] > 1e-3
        assert (rounded - expected["full"]).abs().max() > 1e-3 * rounded.abs().max()


@pytest.mark.parametrize("name", FORMULAS)
def test_it_computes_what_the_formula_says(tmp_path: Path, name: str) -> None:
    source = FORMULAS[name](tmp_path / "source")
    convert(source, tmp_path / "ours")
    assert_same(loaded(tmp_path / "ours"), tokens(), formula(source, tokens()), 1e-5)


def test_the_formula_of_mpt_is_that_of_its_class(tmp_path: Path) -> None:
    from hf_alibi.conversion.mpt import reference

    source = sources.mpt(tmp_path, 12, attn_config={"clip_qkv": 0.7})
    checkpoint = Checkpoint(source)
    logits = reference(checkpoint.config, lambda name: checkpoint[f"transformer.{name}"].double(), tokens())
    expected = logits_of(loaded(source), tokens(), "full")
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("source", [sources.bloom, sources.mpt, sources.refact])
def test_a_decoder_saved_without_its_head_is_read(tmp_path: Path, source: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    whole = source(tmp_path / "whole", 6)
    convert(whole, tmp_path / "ours")
    weights = {name: weight for file in whole.glob("*.safetensors") for name, weight in load_file(file).items()}
    (tmp_path / "bare").mkdir()
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    (tmp_path / "bare" / "config.json").write_text((whole / "config.json").read_text())
    again = convert(tmp_path / "bare", tmp_path / "again")
    for name, weight in loaded(tmp_path / "ours").state_dict().items():
        assert torch.equal(again.state_dict()[name].float(), weight), name


@pytest.mark.parametrize(("dtype", "largest"), [("auto", 1e-5), ("float32", 1e-5), ("bfloat16", 2e-2)])
def test_what_is_folded_is_kept_in_float32_unless_asked(tmp_path: Path, dtype: str, largest: float) -> None:
    source = sources.jais(tmp_path / "source", 12)
    model = convert(source, tmp_path / "ours", dtype=dtype)
    assert model.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    facts = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert facts["verification"]["full"] < largest
    assert len(facts["folded"]) == 3
    if dtype == "bfloat16":
        # The rounding is stated.
        assert facts["verification"]["full"] > 1e-4


def test_what_is_not_folded_keeps_its_dtype(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        source = sources.bloom(tmp_path / f"source-{dtype}", 6, dtype)
        assert convert(source, tmp_path / f"ours-{dtype}").dtype == dtype
        assert AutoConfig.from_pretrained(tmp_path / f"ours-{dtype}").dtype == dtype


def test_the_row_of_the_padding_token_is_kept(tmp_path: Path) -> None:
    source = sources.bloom(tmp_path / "source", 6, pad_token_id=3)
    model = convert(source, tmp_path / "ours")
    assert model.config.pad_token_id == 3
    assert torch.equal(model.model.embed_tokens.weight, AutoModelForCausalLM.from_pretrained(source).lm_head.weight)
    assert model.model.embed_tokens.weight[3].abs().max() > 0


def test_a_text_is_cut_to_what_the_class_can_read(tmp_path: Path) -> None:
    """The class of MPT fails beyond `max_seq_len`, as a source and as a target."""
    source = sources.mpt(tmp_path / "source", 6, max_seq_len=64)
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="mpt")
    for folder in ("ours", "back"):
        facts = json.loads((tmp_path / folder / "conversion.json").read_text())["verification"]
        assert facts["num_tokens"] == 64
        assert max(facts[way] for way in ("full", "padded", "cached")) < 1e-5


def test_a_falcon_with_its_former_name_is_read(tmp_path: Path) -> None:
    source = sources.falcon(tmp_path / "source", 6)
    convert(source, tmp_path / "ours")
    config = json.loads((source / "config.json").read_text())
    for new, old in (("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head")):
        config[old] = config.pop(new)
    former = {
        "model_type": "RefinedWebModel",
        "architectures": ["RWForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    former |= {"multi_query": False, "parallel_attn": False}
    (source / "config.json").write_text(json.dumps(config | former))
    again = convert(source, tmp_path / "again")
    assert again.config.eos_token_id == 2
    for name, weight in loaded(tmp_path / "ours").state_dict().items():
        assert torch.equal(again.state_dict()[name].float(), weight), name


# Fields of well-known configs, and of those that other tools write, beside the ones in `conversion_sources`.
PUBLIC: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom-560m": (
        "bloom",
        {
            "attention_softmax_in_fp32": True, "bias_dropout_fusion": True, "masked_softmax_fusion": True,
            "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100,
            "pad_token_id": 3, "pretraining_tp": 1, "skip_bias_add": True, "skip_bias_add_qkv": False,
            "slow_but_exact": False, "unk_token_id": 0, "use_cache": True, "vocab_size": 250880,
        },
    ),
    "bloom-of-deepspeed-chat": (
        "bloom", {"hidden_size": 1024, "n_head": 16, "dropout": 0.0, "end_token_id": 2, "eos_token_id": 2}
    ),
    "mpt-7b": (
        "mpt",
        {
            "architectures": ["MPTForCausalLM"], "d_model": 4096, "emb_pdrop": 0, "embedding_fraction": 1.0,
            "expansion_ratio": 4, "init_config": {"name": "kaiming_normal_", "verbose": 0}, "init_device": "cpu",
            "attn_config": {
                "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
                "attn_type": "multihead_attention", "attn_uses_sequence_id": False, "clip_qkv": None,
                "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
            },
            "learned_pos_emb": True, "logit_scale": None, "max_seq_len": 2048, "n_heads": 32, "n_layers": 32,
            "no_bias": True, "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "use_cache": False,
            "tokenizer_name": "EleutherAI/gpt-neox-20b", "verbose": 0, "vocab_size": 50432,
        },
    ),
    "falcon-rw-1b": (
        "RefinedWebModel",
        {
            "alibi": True, "architectures": ["RWForCausalLM"], "bias": True, "bos_token_id": 1, "eos_token_id": 2,
            "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
            "hidden_size": 2048, "multi_query": False, "n_head": 32, "n_layer": 24, "parallel_attn": False,
        },
    ),
    "anything-of-transformers-4": (
        "bloom",
        {
            "is_decoder": False, "cross_attention_hidden_size": None, "tie_encoder_decoder": False, "prefix": None,
            "finetuning_task": None, "use_bfloat16": False, "tf_legacy_loss": False, "torchscript": False,
            "decoder_start_token_id": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
            "bad_words_ids": None, "num_beam_groups": 1, "early_stopping": False, "pruned_heads": {},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_configs_of_published_models_are_understood(name: str) -> None:
    kind, config = PUBLIC[name]
    source, read = SOURCES[kind]
    fields = Fields(config | {"model_type": kind, "transformers_version": "4.28.1"}, source)
    AlibiGPTConfig(**read(fields).fields)
    fields.finish()
