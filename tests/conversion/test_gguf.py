"""GGUF files: weights and metadata are those of the model, and what llama.cpp cannot hold is refused."""

import json
import math
import sys
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import conversion_sources as sources
import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from gguf_models import MODELS, SWIGLU, save_model
from huggingface_hub import ModelCard
from tiny import VOCAB_SIZE, tiny_tokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from hf_alibi import AlibiGPTConfig, AlibiGPTForSequenceClassification
from hf_alibi.__main__ import main
from hf_alibi.conversion import convert, llama_cpp, to_gguf
from hf_alibi.conversion.gguf_file import GGUFWeights
from hf_alibi.errors import UserError


def metadata_in(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def fused(weights: dict[str, Tensor], layer: int, suffix: str, factor: float) -> Tensor:
    query, key, value = (weights[f"model.layers.{layer}.self_attn.{letter}_proj.{suffix}"] for letter in "qkv")
    return torch.cat([query * factor, key, value])


@pytest.mark.parametrize("heads", [6, 8])
@pytest.mark.parametrize("name", MODELS)
def test_the_file_holds_the_model(tmp_path: Path, name: str, heads: int) -> None:
    architecture, fields = MODELS[name]
    model = save_model(tmp_path / "ours", fields, heads)
    path = to_gguf(tmp_path / "ours", tmp_path / "theirs")
    assert path == tmp_path / "theirs" / "ours-F32.gguf"
    config, metadata = model.config, metadata_in(path)
    expected = {
        "general.architecture": architecture,
        "general.name": "ours",
        "general.file_type": LlamaFileType.ALL_F32,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": 16 * heads,
        f"{architecture}.block_count": 2,
        f"{architecture}.feed_forward_length": 64 * heads,
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.max_alibi_bias": config.alibi_max_bias,
    }
    assert {key: metadata[key] for key in expected} == expected
    epsilon = "layer_norm_rms_epsilon" if architecture == "refact" else "layer_norm_epsilon"
    assert metadata[f"{architecture}.attention.{epsilon}"] == pytest.approx(config.norm_eps)
    assert metadata.get(f"{architecture}.attention.clamp_kqv") == config.clip_qkv

    ours, theirs = model.state_dict(), dict(GGUFWeights(path))
    assert torch.equal(theirs.pop("token_embd.weight"), ours["model.embed_tokens.weight"].double())
    head = theirs.pop("output.weight", None)
    assert (head is None) == (config.tie_word_embeddings and architecture != "jais")
    assert head is None or torch.equal(head, ours["lm_head.weight"].double())
    factor = 4.0 if architecture == "jais" else 1.0  # the root of head_dim
    places = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate": "mlp.gate_proj",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    }  # fmt: skip
    for key, found in theirs.items():
        stem, _, suffix = key.rpartition(".")
        if stem in ("output_norm", "token_embd_norm"):
            place = {"output_norm": "model.norm", "token_embd_norm": "model.embedding_norm"}[stem]
            wanted = ours.get(f"{place}.{suffix}")
        else:
            _, layer, place = stem.split(".")
            if place == "attn_qkv":
                has_it = f"model.layers.{layer}.self_attn.q_proj.{suffix}" in ours
                wanted = fused(ours, int(layer), suffix, factor) if has_it else None
            else:
                wanted = ours.get(f"model.layers.{layer}.{places[place]}.{suffix}")
        if wanted is None:  # a bias that the architecture has and the model has not
            assert suffix == "bias"
            wanted = torch.zeros(found.shape)
        assert torch.equal(found, wanted.double()), key
    num_norms = 5 + config.embedding_norm
    num_matrices = 2 * ((6 if architecture == "refact" else 4) + config.mlp_gated)
    has_biases = architecture in ("jais", "bloom") or config.attention_bias
    assert len(theirs) == (num_norms + num_matrices) * (1 + has_biases)


@pytest.mark.parametrize("name", MODELS)
def test_its_formula_gives_the_logits_of_the_model(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path / "ours", MODELS[name][1]).double()
    file = GGUFWeights(to_gguf(tmp_path / "ours", tmp_path / "theirs"))
    ids = torch.randint(0, VOCAB_SIZE, (150,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    found = llama_cpp.reference(file.metadata, file, ids)
    tolerance = 2e-3 if name == "mpt-exact-gelu" else 1e-6  # the tanh formula; slopes and norms in float32
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    facts = json.loads((tmp_path / "theirs" / "conversion.json").read_text())
    assert facts["verification"]["full"] < max(tolerance, 1e-5)  # there, the model computes in float32
    assert ("llama.cpp computes GELU by its tanh formula." in facts["differs"]) == (name == "mpt-exact-gelu")


@pytest.mark.parametrize(
    ("dtype", "outtype", "expected"),
    [
        (torch.float32, "auto", "F32"),
        (torch.bfloat16, "auto", "BF16"),
        (torch.float16, "auto", "F16"),
        (torch.bfloat16, "f32", "F32"),
        (torch.float32, "bf16", "BF16"),
        (torch.float32, "f16", "F16"),
        (torch.float32, "q8_0", "Q8_0"),
    ],
)
def test_matrices_are_of_the_type_asked_for(tmp_path: Path, dtype: torch.dtype, outtype: str, expected: str) -> None:
    ours = save_model(tmp_path / "ours", MODELS["jais"][1], dtype=dtype).state_dict()
    path = to_gguf(tmp_path / "ours", tmp_path / "theirs", outtype=outtype)
    assert path.name == f"ours-{expected}.gguf"
    kind = "ALL_F32" if expected == "F32" else f"MOSTLY_{expected}"
    assert metadata_in(path)["general.file_type"] == LlamaFileType[kind]
    for tensor in GGUFReader(path).tensors:
        assert tensor.tensor_type.name == (expected if len(tensor.shape) == 2 else "F32"), tensor.name
    weight, found = ours["model.layers.1.mlp.down_proj.weight"].double(), GGUFWeights(path)["blk.1.ffn_down.weight"]
    if expected == "Q8_0":
        scale = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
        error = (found - weight).abs().unflatten(1, (-1, 32))
        assert (error <= scale * (0.5 + 127 * 2.0**-11 + 1e-6)).all()  # half a step, and a scale in half precision
        assert error.max() > 0
    else:
        rounded = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[expected]
        assert torch.equal(found, weight.to(rounded).double())


def test_what_is_multiplied_into_weights_is_not_rounded_unasked(tmp_path: Path) -> None:
    fields = MODELS["jais"][1] | {"hidden_size": 48}
    weight = save_model(tmp_path / "ours", fields, dtype=torch.bfloat16).model.layers[0].self_attn.q_proj.weight
    path = to_gguf(tmp_path / "ours", tmp_path / "theirs")
    assert path.name == "ours-F32.gguf"
    found = GGUFWeights(path)["blk.0.attn_qkv.weight"][:48]
    assert torch.equal(found, (weight.float() * math.sqrt(8)).double())
    facts = json.loads((path.parent / "conversion.json").read_text())
    assert facts["folded"] == ["The queries hold sqrt(8), since `jais` divides scores by head_dim."]


def test_models_that_came_in_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "VOCAB", VOCAB_SIZE)
    for name, make in {"jais": sources.jais, "bloom": sources.bloom, "mpt": sources.mpt}.items():
        folder = make(tmp_path / name)
        tiny_tokenizer().save_pretrained(folder)
        (folder / "generation_config.json").write_text(GenerationConfig(eos_token_id=0).to_json_string())
        convert(folder, tmp_path / f"{name}-ours")
        path = to_gguf(tmp_path / f"{name}-ours", tmp_path / f"{name}-gguf")
        assert metadata_in(path)["general.architecture"] == name


REFUSED: dict[str, tuple[str, Any]] = {
    "head_dim": ("refact", 32),
    "hidden_act": ("refact", "relu2"),
    "mlp_gated": ("jais", False),
    "alibi_max_bias": ("refact", 16),
    "alibi_slopes": ("jais", [0.1] * 6),
    "alibi_slopes_trainable": ("mpt", True),
    "alibi_scaling": ("bloom", {"type": "linear", "factor": 2.0}),
    "window_tolerance": ("jais", 0.01),
    "qk_norm": ("refact", True),
    "clip_qkv": ("jais", 6),
    "attention_bias": ("refact", True),
    "mlp_bias": ("refact", True),
    "norm_type": ("bloom", "rmsnorm"),
    "embedding_norm": ("jais", True),
    "use_parallel_residual": ("mpt", True),
}
HELD = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "training_length", "norm_bias", "norm_eps", "hidden_dropout", "attention_dropout",
    "initializer_range", "use_cache", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
    # Without QK-norm it means nothing.
    "qk_norm_gain",
}  # fmt: skip


def test_every_field_of_ours_is_held_or_refused(tmp_path: Path) -> None:
    own = {field.name for field in dataclass_fields(AlibiGPTConfig)}
    own -= {field.name for field in dataclass_fields(PreTrainedConfig)}
    assert own == HELD | set(REFUSED)
    for name, (architecture, value) in REFUSED.items():
        rest = {"norm_bias": False} if name == "norm_type" else {}
        save_model(tmp_path / name, MODELS[architecture][1] | {name: value} | rest)
        with pytest.raises(UserError, match=rf"{architecture} needs one trained with .*{name}=.*\(here "):
            to_gguf(tmp_path / name, tmp_path / "theirs")
        assert not (tmp_path / "theirs").exists()


def test_our_default_is_told_what_to_train_instead(tmp_path: Path) -> None:
    save_model(tmp_path / "ours", {"qk_norm": True})
    with pytest.raises(UserError) as refusal:
        to_gguf(tmp_path / "ours", tmp_path / "theirs")
    assert str(refusal.value) == (
        "llama.cpp has no architecture that computes this model: refact needs one trained with mlp_gated=True (here "
        "False), hidden_act='silu' (here 'relu2'), qk_norm=False (here True), or mpt needs one trained with "
        "norm_type='layernorm' (here 'rmsnorm'), hidden_act='gelu_pytorch_tanh' (here 'relu2'), qk_norm=False (here "
        "True). As to qk_norm, it has no norm over the queries and keys of each head together with ALiBi"
    )


def test_a_wrong_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "ours", SWIGLU)
    wrong = dict(llama_cpp.RENAMES)
    wrong["blk.{}.attn_norm"], wrong["blk.{}.ffn_norm"] = wrong["blk.{}.ffn_norm"], wrong["blk.{}.attn_norm"]
    monkeypatch.setattr(llama_cpp, "RENAMES", wrong)
    with pytest.raises(UserError, match="the file does not hold its source: logits differ"):
        to_gguf(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_other_refusals(tmp_path: Path) -> None:
    model = save_model(tmp_path / "ours", SWIGLU | {"intermediate_size": 100})
    with pytest.raises(UserError, match=r"rows of a multiple of 32 weights, .*intermediate_size is 100"):
        to_gguf(tmp_path / "ours", tmp_path / "theirs", outtype="q8_0")
    with pytest.raises(UserError, match="outtype 'q4_0' is none of auto, f32"):
        to_gguf(tmp_path / "ours", tmp_path / "theirs", outtype="q4_0")
    with pytest.raises(UserError, match="the text to compare on is too short"):
        to_gguf(tmp_path / "ours", tmp_path / "theirs", text="short")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = 1e5
    model.save_pretrained(tmp_path / "large")
    tiny_tokenizer().save_pretrained(tmp_path / "large")
    with pytest.raises(UserError, match=r"token_embd.weight holds 1e\+05, which is beyond f16"):
        to_gguf(tmp_path / "large", tmp_path / "theirs", outtype="f16")
    (tmp_path / "large" / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match=r"generation_config.json is not valid"):
        to_gguf(tmp_path / "large", tmp_path / "theirs")
    sources.bloom(tmp_path / "bloom")
    with pytest.raises(UserError, match=r"only alibi_gpt becomes gguf; .*'bloom': convert that first"):
        to_gguf(tmp_path / "bloom", tmp_path / "theirs")
    AlibiGPTForSequenceClassification(model.config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match="AlibiGPTForSequenceClassification"):
        to_gguf(tmp_path / "classifier", tmp_path / "theirs")
    with pytest.raises(UserError, match="'gguf' is no target; choose bloom or mpt, or call to_gguf"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="gguf")


def test_without_the_package_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'hf_alibi\[gguf\]'"):
        to_gguf(tmp_path / "ours", tmp_path / "theirs")


def test_the_file_ends_texts_where_generate_does(tmp_path: Path) -> None:
    save_model(tmp_path / "ours", SWIGLU)
    generation = GenerationConfig(eos_token_id=[7, 9])
    (tmp_path / "ours" / "generation_config.json").write_text(generation.to_json_string())
    metadata = metadata_in(to_gguf(tmp_path / "ours", tmp_path / "theirs"))
    assert (metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.eot_token_id"]) == (7, 9)
    assert metadata["tokenizer.chat_template"] == tiny_tokenizer().chat_template


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "ours", SWIGLU)
    (tmp_path / "ours" / "README.md").write_text("---\nlicense: mit\n---\n\n# Ours\n")
    arguments = ["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "gguf"]
    for option in ("--dtype", "--max_shard_size"):
        with pytest.raises(UserError, match=f"{option} says nothing about a GGUF file"):
            main([*arguments, option, "bfloat16"])
    with pytest.raises(UserError, match="--outtype is for --to gguf"):
        main([*arguments[:-1], "mpt", "--outtype", "f32"])
    main([*arguments, "--outtype", "q8_0"])
    printed = capsys.readouterr().out
    assert "Converted to GGUF, the architecture `refact` of llama.cpp" in printed
    assert "the formula of llama.cpp's `refact` in float64" in printed
    assert metadata_in(tmp_path / "theirs" / "ours-Q8_0.gguf")["general.license"] == "mit"
    card = ModelCard.load(tmp_path / "theirs" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.tags) == ("mit", "gguf", ["alibi", "gguf"])
    assert "weights are q8_0" in card.text
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        "README.md", "conversion.json", "ours-Q8_0.gguf"
    }  # fmt: skip
