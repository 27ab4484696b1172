"""What cannot be converted raises an error with name and value, before anything is written."""

import json
import re
from collections.abc import Callable
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import conversion_sources as sources
import pytest
import torch
from bomb import write_bomb
from damage import edit_config, edit_weights, truncate
from safetensors.torch import load_file, save_file
from tiny import save_checkpoint
from transformers import BloomConfig, FalconConfig, MptConfig, PreTrainedConfig
from transformers.models.mpt.configuration_mpt import MptAttentionConfig

from hf_alibi import AlibiGPTConfig
from hf_alibi.conversion import baichuan, bloom, convert, falcon, jais, mpt, refact
from hf_alibi.conversion.checkpoint import Checkpoint
from hf_alibi.conversion.convert import SOURCES
from hf_alibi.conversion.fields import Fields
from hf_alibi.conversion.rules import Plan
from hf_alibi.conversion.verify import verify
from hf_alibi.errors import UserError

# Fields of any config: the first are copied, and the second do not change what a model computes.
CARRIED = {"id2label", "label2id", "problem_type", "output_hidden_states", "return_dict"}
INDIFFERENT = {"transformers_version", "dtype", "chunk_size_feed_forward"}
# Values that mean something in the source and cannot be expressed here. Other fields get a text instead of a number.
WITHOUT_A_PLACE: dict[str, dict[str, Any]] = {
    "common": {"architectures": ["BloomForSequenceClassification"], "is_encoder_decoder": True},
    "bloom": {"apply_residual_connection_post_layernorm": True},
    "mpt": {
        "embedding_fraction": 0.5,
        "emb_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "logit_scale": "sqrt",
        "norm_type": "batchnorm",
        "init_device": 3,
        "expansion_ratio": "wide",
    },
    "attn_config": {
        "attn_type": "sparse",
        "attn_impl": 3,
        "prefix_lm": True,
        "qk_ln": True,
        "attn_uses_sequence_id": True,
        "alibi": False,
    },
    "falcon": {
        "num_ln_in_parallel_attn": 2,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "alibi": False,
        "activation": "step",
        "rope_parameters": "yarn",
    },
}
READERS: dict[str, tuple[type[PreTrainedConfig], Callable[[Fields], Plan], dict[str, Any]]] = {
    "bloom": (BloomConfig, bloom.read, {}),
    "mpt": (MptConfig, mpt.read, {}),
    "falcon": (FalconConfig, falcon.read, {"alibi": True, "multi_query": False, "parallel_attn": False}),
}


def plan_of(kind: str, config: dict[str, Any]) -> Plan:
    fields = Fields(config, kind)
    plan = READERS[kind][1](fields)
    fields.finish()
    return plan


def names(config_class: type[PreTrainedConfig]) -> list[str]:
    return [field.name for field in dataclass_fields(config_class) if field.name not in CARRIED | INDIFFERENT]


@pytest.mark.parametrize("kind", READERS)
def test_every_field_of_a_class_is_refused_with_a_value_that_has_no_place(kind: str) -> None:
    config_class, _, fields = READERS[kind]
    config = json.loads(config_class(**fields).to_json_string(use_diff=False))
    plan_of(kind, config)
    for name in names(config_class):
        value = (WITHOUT_A_PLACE["common"] | WITHOUT_A_PLACE[kind]).get(name, "nonsense")
        with pytest.raises(UserError) as refusal:
            plan_of(kind, config | {name: value})
        if value == 0.1:
            # One of two fields that must agree.
            assert re.search(f"{name}.*0.1|0.1.*{name}", str(refusal.value))
        else:
            assert f"{name}={value!r}" in str(refusal.value)


def test_every_field_of_the_attention_of_mpt_is_refused_with_a_value_that_has_no_place() -> None:
    config = json.loads(MptConfig().to_json_string(use_diff=False))
    attention = config.pop("attn_config")
    plan_of("mpt", config | {"attn_config": attention})
    for name in names(MptAttentionConfig):
        value = (WITHOUT_A_PLACE["common"] | WITHOUT_A_PLACE["attn_config"]).get(name, "nonsense")
        with pytest.raises(UserError) as refusal:
            plan_of("mpt", config | {"attn_config": attention | {name: value}})
        assert f"attn_config.{name}={value!r}" in str(refusal.value)


@pytest.mark.parametrize("kind", READERS)
def test_a_class_without_values_means_its_defaults(kind: str) -> None:
    config_class, _, fields = READERS[kind]
    full = json.loads(config_class(**fields).to_json_string(use_diff=False))
    assert plan_of(kind, fields).fields.items() <= plan_of(kind, full).fields.items()


@pytest.mark.parametrize("kind", READERS)
def test_what_every_config_has_travels_along(kind: str) -> None:
    config_class, _, fields = READERS[kind]
    labels: dict[str, Any] = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    labels |= {"output_hidden_states": True, "problem_type": "regression"}
    found = AlibiGPTConfig(**plan_of(kind, config_class(**fields, **labels).to_dict()).fields)
    assert {name: getattr(found, name) for name in labels} == labels


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        (falcon.read, {}, "alibi=None cannot be converted: only models with ALiBi"),
        (falcon.read, {"alibi": True, "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        (falcon.read_refined_web, {"alibi": True}, "the config of It has no multi_query"),
        (bloom.read, {"prefix": "Question: "}, "prefix='Question: ' .* no text is put before"),
        (
            falcon.read,
            {"alibi": True, "new_decoder_architecture": True, "parallel_attn": False},
            "parallel_attn=False",
        ),
        (
            baichuan.read,
            {"hidden_size": 4096, "vocab_size": 64000},
            "hidden_size=4096 .* Baichuan-7B, which is rotary",
        ),
        (baichuan.read, {"max_position_embeddings": 4096}, "max_position_embeddings=4096 .* rotary"),
        (baichuan.read, {"vocab_size": 32000}, "vocab_size=32000"),
        (baichuan.read, {"z_loss_weight": 1e-4}, "z_loss_weight=0.0001"),
        (baichuan.read, {"architectures": ["BaiChuanForCausalLM"]}, r"architectures=\['BaiChuanForCausalLM'\]"),
        (jais.read, {}, "position_embedding_type"),
        (jais.read, {"position_embedding_type": "learned"}, "position_embedding_type='learned'"),
        (jais.read, {"position_embedding_type": "alibi", "scale_attn_by_inverse_layer_idx": True}, "layer_idx=True"),
        (jais.read, {"position_embedding_type": "alibi", "alibi_scaling": {"type": "ntk"}}, "alibi_scaling={'type'"),
        (jais.read, {"position_embedding_type": "alibi", "mup_width_scale": 0.0}, "mup_width_scale=0.0"),
        (jais.read, {"position_embedding_type": "alibi", "embd_pdrop": 0.0}, "embd_pdrop=0.0 .* resid_pdrop, 0.1"),
        (refact.read, {"multi_query": False}, "multi_query=False"),
        (refact.read, {"activation_function": "gelu"}, "activation_function='gelu'"),
        (mpt.read, {"attn_config": {"softmax_scale": 0.1, "clip_qkv": 6}}, "attn_config.softmax_scale=0.1"),
        (mpt.read, {"attn_config": {"rope": True}}, "attn_config.rope=True"),
        (mpt.read, {"attn_config": {"sliding_window_size": 128}}, "attn_config.sliding_window_size=128"),
        (mpt.read, {"attn_config": {"kv_n_heads": 3}}, "attn_config.kv_n_heads=3"),
        (mpt.read, {"attn_config": {"new_trick": None}}, "attn_config.new_trick=None .* nothing is known"),
        (mpt.read, {"attn_config": 3}, "attn_config=3"),
        (mpt.read, {"ffn_config": {"ffn_type": "mb_moe"}}, "ffn_config.ffn_type='mb_moe'"),
        (mpt.read, {"ffn_config": {"ffn_act_fn": {"name": "tanh"}}}, "ffn_config.ffn_act_fn={'name': 'tanh'}"),
        (mpt.read, {"residual_modification": "layer"}, "residual_modification='layer'"),
        (bloom.read, {"new_trick": 0}, "new_trick=0 cannot be converted: nothing is known"),
        (bloom.read, {"n_embed": 64, "hidden_size": 32}, "n_embed=64 .* but hidden_size is 32"),
        (bloom.read, {"hidden_size": True}, "hidden_size=True"),
        (bloom.read, {"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
def test_what_cannot_be_expressed_is_refused(read: Callable[[Fields], Plan], config: dict, message: str) -> None:
    def read_all() -> None:
        fields = Fields(config, "It")
        read(fields)
        fields.finish()

    with pytest.raises(UserError, match=message):
        read_all()


def rename(weights: dict[str, torch.Tensor], old: str, new: str) -> None:
    weights[new] = weights.pop(old)


DENSE = "transformer.h.1.mlp.dense_h_to_4h"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a weight too many": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({"transformer.wpe.weight": torch.ones(3)})),
        "no place for: transformer.wpe.weight",
    ),
    "a weight too few": (
        lambda folder: edit_weights(folder, lambda weights: weights.pop(f"{DENSE}.weight")),
        "lacks h.1.mlp.dense_h_to_4h.weight",
    ),
    "another shape": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({f"{DENSE}.bias": torch.ones(5)})),
        r"transformer.h.1.mlp.dense_h_to_4h.bias gives model.layers.1.mlp.up_proj.bias the shape \[5\]",
    ),
    "a head that is not the embedding": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.ones(97, 48)})),
        "tie_word_embeddings says that the head is the embedding",
    ),
    "a quantised weight": (
        lambda folder: edit_weights(
            folder, lambda weights: weights.update({f"{DENSE}.weight": torch.ones(192, 48, dtype=torch.int8)})
        ),
        "torch.int8: convert the checkpoint that was not quantised",
    ),
    "a weight twice": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({"ln_f.bias": torch.ones(48)})),
        "which are the same weight",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot read .*config.json"),
    "an unknown architecture": (
        lambda folder: edit_config(folder, model_type="gpt2"),
        "is of type 'gpt2'; known are bloom",
    ),
    "a shard too few": (lambda folder: next(folder.glob("*.safetensors")).unlink(), "which is not there"),
    "a truncated shard": (lambda folder: truncate(next(folder.glob("*.safetensors"))), "is damaged"),
    "a refused generation config": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        "generation_config.json is not valid",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_nothing_is_left(tmp_path: Path, damage: str) -> None:
    source = sources.bloom(tmp_path / "source", 6)
    do, message = DAMAGES[damage]
    do(source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_slopes_in_the_checkpoint_must_be_the_papers(tmp_path: Path) -> None:
    source = sources.jais(tmp_path / "source", 6)
    edit_weights(source, lambda weights: weights.update({"transformer.relative_pe.slopes": torch.full((6, 1), 0.5)}))
    with pytest.raises(UserError, match=r"relative_pe.slopes holds \[0.5"):
        convert(source, tmp_path / "ours")


def test_a_missing_bias_is_zero_but_a_superfluous_one_is_refused(tmp_path: Path) -> None:
    source = sources.bloom(tmp_path / "source", 6)
    edit_weights(source, lambda weights: weights.pop(f"{DENSE}.bias"))
    # Transformers' class would invent a bias, so it cannot be compared with. The result must state zeros.
    plan_fields = Fields(json.loads((source / "config.json").read_text()), "BLOOM")
    assert bloom.read(plan_fields).fields["mlp_bias"]
    plain = sources.mpt(tmp_path / "mpt", 6)
    edit_weights(plain, lambda weights: weights.update({"transformer.blocks.0.attn.out_proj.bias": torch.ones(48)}))
    with pytest.raises(UserError, match=r"no place for: transformer\.blocks\.0\.attn\.out_proj\.bias"):
        convert(plain, tmp_path / "ours")


def test_pickles_are_read_on_request_and_run_nothing(tmp_path: Path) -> None:
    source = sources.bloom(tmp_path / "source", 6)
    expected = convert(source, tmp_path / "expected")
    files = list(source.glob("*.safetensors"))
    weights = {name: weight for file in files for name, weight in load_file(file).items()}
    for file in [*files, source / "model.safetensors.index.json"]:
        file.unlink()
    halves = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
    for number, half in enumerate(halves, 1):
        torch.save(half, source / f"pytorch_model-0000{number}-of-00002.bin")
    index = {
        name: f"pytorch_model-0000{number}-of-00002.bin" for number, half in enumerate(halves, 1) for name in half
    }
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    with pytest.raises(UserError, match="only pickled weights; allow_pickle reads them, as tensors"):
        convert(source, tmp_path / "ours")
    model = convert(source, tmp_path / "ours", allow_pickle=True)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    write_bomb(source / "pytorch_model-00001-of-00002.bin", tmp_path / "crater")
    with pytest.raises(UserError, match="is no file of tensors"):
        convert(source, tmp_path / "again", allow_pickle=True)
    assert not (tmp_path / "crater").exists()


def test_a_target_that_holds_something_is_refused(tmp_path: Path) -> None:
    source = sources.bloom(tmp_path / "source", 6)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").touch()
    with pytest.raises(UserError, match="is not empty; choose a new folder"):
        convert(source, tmp_path / "ours")
    assert (tmp_path / "ours" / "precious").exists()


def test_a_model_that_is_not_its_source_is_noticed(tmp_path: Path) -> None:
    source = sources.bloom(tmp_path / "source", 6)
    convert(source, tmp_path / "ours")
    checkpoint = Checkpoint(source)
    plan = SOURCES["bloom"][1](Fields(checkpoint.config, "BLOOM"))
    ids = torch.arange(4, 90)
    verify(plan, checkpoint, tmp_path / "ours", ids, "numbers", is_exact=True)
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 1.01
    save_file(weights, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match="the converted model does not equal its source: logits differ from Transformers' Bloom"
    ):
        verify(plan, checkpoint, tmp_path / "ours", ids, "numbers", is_exact=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "gpt2"}, "'gpt2' is no target"),
        ({"to": "bloom"}, "only alibi_gpt becomes bloom"),
        ({"text": "Too short."}, "too short: 10 tokens, of at least 38"),
        ({"max_shard_size": "much"}, "max_shard_size must be a size such as 500MB or 5GB, got 'much'"),
        ({"dtype": "int8"}, "dtype 'int8' is none for weights"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    source = sources.bloom(tmp_path / "source", 6)
    (tmp_path / "ours").mkdir()
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "ours", **arguments)
    assert not any((tmp_path / "ours").iterdir())


def test_ours_is_no_source_without_a_target(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an AlibiGPT already; --to says what it becomes: bloom, mpt or gguf"):
        convert(save_checkpoint(tmp_path / "tiny"), tmp_path / "ours")
