"""BLOOM and MPT are unchanged after a round trip. What they cannot express raises an error with the value to train."""

import json
from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import conversion_sources as sources
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.conversion import convert
from hf_alibi.errors import UserError

SHAPE = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "qk_norm": False}
LIKE_BLOOM = SHAPE | {
    "norm_type": "layernorm", "norm_bias": True, "attention_bias": True, "mlp_bias": True, "embedding_norm": True,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
LIKE_MPT = SHAPE | {"norm_type": "layernorm", "hidden_act": "gelu"}


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


@pytest.mark.parametrize(
    ("source", "to", "fields"),
    [
        (sources.bloom, "bloom", {"hidden_dropout": 0.1, "attention_dropout": 0.2}),
        (sources.bloom, "bloom", {"tie_word_embeddings": False, "seq_length": 512}),
        (sources.mpt, "mpt", {"attn_config": {"clip_qkv": 0.5}}),
        (sources.mpt, "mpt", {"resid_pdrop": 0.1, "emb_pdrop": 0.1, "pad_token_id": 5}),
    ],
    ids=["bloom", "bloom-with-a-head", "mpt", "mpt-with-dropout"],
)
@pytest.mark.parametrize("heads", [6, 8])
def test_a_round_trip_changes_no_bit(
    tmp_path: Path, source: Callable[..., Path], to: str, fields: dict[str, Any], heads: int
) -> None:
    there = source(tmp_path / "there", heads, **fields)
    (there / "generation_config.json").write_text(GenerationConfig(do_sample=True, top_k=7).to_json_string())
    tiny_tokenizer().save_pretrained(there)
    convert(there, tmp_path / "ours", max_shard_size="20KB")
    back = convert(tmp_path / "ours", tmp_path / "back", to=to)
    before, after = weights_in(there), weights_in(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.dtype == after[name].dtype, name
        assert torch.equal(weight, after[name]), name
    configs = [AutoConfig.from_pretrained(folder).to_dict() for folder in (there, tmp_path / "back")]
    for config in configs:
        config.pop("dtype"), config.pop("_name_or_path")
    assert configs[0] == configs[1]
    assert type(back).__name__ == configs[0]["architectures"][0]
    assert back.generation_config.top_k == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "back").get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("to", "fields"),
    [
        ("bloom", LIKE_BLOOM),
        ("bloom", LIKE_BLOOM | {"attention_bias": False, "mlp_bias": False, "norm_bias": False}),
        ("bloom", LIKE_BLOOM | {"hidden_act": "gelu_new", "tie_word_embeddings": False}),
        ("mpt", LIKE_MPT),
        ("mpt", LIKE_MPT | {"clip_qkv": 0.5, "tie_word_embeddings": False, "norm_eps": 1e-5}),
    ],
)
def test_a_model_of_ours_computes_the_same_in_transformers_class(
    tmp_path: Path, to: str, fields: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    ours = AlibiGPTForCausalLM(AlibiGPTConfig(initializer_range=0.2, **fields)).eval()
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert theirs.config.model_type == to
    ids = torch.randint(0, 97, (2, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(ids).logits
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        sequence = theirs.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
        assert torch.equal(sequence, ours.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0))
    facts = json.loads((tmp_path / "theirs" / "conversion.json").read_text())
    assert facts["verification"]["against"] == "AlibiGPTForCausalLM"
    assert max(facts["verification"][way] for way in ("full", "padded", "cached")) < 1e-5
    assert "## Conversion" in (tmp_path / "theirs" / "README.md").read_text()


REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 100, "hidden_act": "gelu", "mlp_gated": True,
        "alibi_max_bias": 16, "alibi_slopes": [0.1] * 6, "alibi_slopes_trainable": True,
        "alibi_scaling": {"type": "dynamic"}, "qk_norm": True, "clip_qkv": 6, "embedding_norm": False,
        "use_parallel_residual": True, "window_tolerance": 0.01,
    },
    "mpt": {
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 100, "hidden_act": "relu2", "mlp_gated": True,
        "alibi_max_bias": 16, "alibi_slopes": [0.1] * 6, "alibi_slopes_trainable": True,
        "alibi_scaling": {"type": "linear", "factor": 2.0}, "qk_norm": True, "attention_bias": True, "mlp_bias": True,
        "norm_bias": True, "embedding_norm": True, "use_parallel_residual": True, "attention_dropout": 0.1,
        "window_tolerance": 0.01,
    },
}  # fmt: skip
# Fields that both classes have, or that only change the time.
HELD = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "training_length", "norm_eps",
    "hidden_dropout", "initializer_range", "use_cache", "tie_word_embeddings", "pad_token_id",
    "bos_token_id", "eos_token_id",
    # Without QK-norm it means nothing.
    "qk_norm_gain",
}  # fmt: skip


@pytest.mark.parametrize("to", REFUSED)
def test_every_field_of_ours_is_held_or_refused(tmp_path: Path, to: str) -> None:
    fields = {"bloom": LIKE_BLOOM, "mpt": LIKE_MPT}[to]
    own = {field.name for field in dataclass_fields(AlibiGPTConfig)}
    own -= {field.name for field in dataclass_fields(PreTrainedConfig)}
    also_held = {"bloom": {"attention_bias", "mlp_bias", "norm_bias", "attention_dropout"}, "mpt": {"clip_qkv"}}[to]
    assert own == REFUSED[to].keys() | HELD | also_held | {"norm_type"}
    cases = REFUSED[to] | {"norm_type": "rmsnorm"}
    for name, value in cases.items():
        wanted = fields | {name: value} | ({"norm_bias": False} if name == "norm_type" else {})
        AlibiGPTForCausalLM(AlibiGPTConfig(**wanted)).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}=") as refusal:
            convert(tmp_path / name, tmp_path / "theirs", to=to)
        assert f"trained with {name}=" in str(refusal.value) or name == "attention_dropout"


def test_a_refusal_names_everything_that_does_not_fit(tmp_path: Path) -> None:
    AlibiGPTForCausalLM(AlibiGPTConfig(**SHAPE | {"qk_norm": True, "alibi_slopes": [0.1] * 6})).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError) as refusal:
        convert(tmp_path, tmp_path / "theirs", to="bloom")
    assert str(refusal.value) == (
        "for BLOOM: alibi_slopes=[0.1, 0.1, 0.1, 0.1, 0.1, 0.1], qk_norm=True, norm_type='rmsnorm', "
        "embedding_norm=False, hidden_act='relu2' cannot be converted: a BLOOM needs a model trained with "
        "alibi_slopes=None, qk_norm=False, norm_type='layernorm', embedding_norm=True, hidden_act='gelu_pytorch_tanh'"
    )
    many = [0.0123456789] * 64
    fields = SHAPE | {"alibi_slopes": many, "hidden_size": 128, "num_attention_heads": 64, "num_key_value_heads": 64}
    AlibiGPTForCausalLM(AlibiGPTConfig(**fields)).save_pretrained(tmp_path / "many")
    for to in ("bloom", "mpt"):
        with pytest.raises(UserError) as refusal:
            convert(tmp_path / "many", tmp_path / "theirs", to=to)
        assert len(str(refusal.value)) < 500
