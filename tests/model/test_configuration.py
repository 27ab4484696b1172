"""The config: lengths that tools read from it, fields that it knows, and slopes that it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from huggingface_hub.errors import StrictDataclassError
from tiny import save_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.model.configuration_alibi_gpt import LONGEST_TEXT
from hf_alibi.positions.sinusoidal import SinusoidalGPTConfig

FIRST_RELEASE = Path(__file__).parents[1] / "fixtures" / "first-release"


# These functions look up lengths as the tools do, in the same order.


def evaluation_harness(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the length that `HFLM.max_length` of lm-evaluation-harness finds. lighteval and others do the same."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if hasattr(config, name):
            return getattr(config, name)
    return 2048 if tokenizer.model_max_length > 10**29 else tokenizer.model_max_length


def embedding_library(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the length that `max_seq_length` of sentence-transformers finds."""
    return min(config.max_position_embeddings, tokenizer.model_max_length)


def context_window(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the length that `HuggingFaceLLM` of llama-index finds: 3,900, or a smaller one in the config."""
    return min(int(config.to_dict().get("max_position_embeddings", 3900)), 3900)


@pytest.mark.parametrize("trained_at", [32, 4096])
@pytest.mark.parametrize(
    ("tool", "least"), [(evaluation_harness, 10**6), (embedding_library, 10**6), (context_window, 3900)]
)
def test_no_tool_takes_the_training_length_for_a_limit(tmp_path: Path, trained_at: int, tool: Any, least: int) -> None:
    folder = save_checkpoint(tmp_path, AlibiGPTConfig(vocab_size=290, hidden_size=32, num_hidden_layers=1,
                             num_attention_heads=4, training_length=trained_at))  # fmt: skip
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tool(config, tokenizer) >= least
    assert tokenizer.model_max_length > 10**29
    assert config.training_length == trained_at


def test_up_to_the_longest_text_every_distance_is_exact() -> None:
    distances = torch.tensor([LONGEST_TEXT - 1, LONGEST_TEXT, LONGEST_TEXT + 1])
    assert (distances.float().long() == distances).tolist() == [True, True, False]
    assert AlibiGPTConfig().max_position_embeddings == SinusoidalGPTConfig().max_position_embeddings == LONGEST_TEXT


def test_the_training_length_is_saved_under_its_name(tmp_path: Path) -> None:
    AlibiGPTConfig(training_length=77).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["training_length"] == 77
    assert "max_position_embeddings" not in saved
    assert AutoConfig.from_pretrained(tmp_path).training_length == 77
    assert AlibiGPTConfig().training_length == 512


def test_its_first_name_is_still_understood(tmp_path: Path) -> None:
    assert AlibiGPTConfig(max_position_embeddings=256).training_length == 256
    for name in ("qk-norm", "layer-norm"):
        assert AutoConfig.from_pretrained(FIRST_RELEASE / name).training_length == 32
    AlibiGPTConfig(training_length=77).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, max_position_embeddings=99).training_length == 99
    assert AutoConfig.from_pretrained(FIRST_RELEASE / "qk-norm", training_length=64).training_length == 64
    config = AlibiGPTConfig()
    config.max_position_embeddings = 128
    assert config.training_length == 128


def test_two_training_lengths_are_refused() -> None:
    message = "training_length is 512, but max_position_embeddings, its former name, is 256"
    with pytest.raises(ValueError, match=message):
        AlibiGPTConfig(training_length=512, max_position_embeddings=256)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(FIRST_RELEASE / "qk-norm", training_length=512, max_position_embeddings=256)
    assert AlibiGPTConfig(training_length=256, max_position_embeddings=256).training_length == 256


@pytest.mark.parametrize("length", [0, -1, "many", 2.5])
def test_a_training_length_is_a_positive_number(length: Any) -> None:
    for name in ("training_length", "max_position_embeddings"):
        with pytest.raises((ValueError, StrictDataclassError), match="training_length"):
            AlibiGPTConfig(**{name: length})


@torch.no_grad()
def test_dynamic_scaling_follows_the_training_length_of_an_old_config() -> None:
    dynamic = {"alibi_scaling": {"type": "dynamic"}}
    old, new = (
        AutoModelForCausalLM.from_pretrained(FIRST_RELEASE / "qk-norm", **dynamic, **length)
        for length in ({}, {"training_length": 32})
    )
    other = AutoModelForCausalLM.from_pretrained(FIRST_RELEASE / "qk-norm", **dynamic, training_length=16)
    ids = torch.arange(3, 83)[None]
    assert torch.equal(old(ids).logits, new(ids).logits)
    assert not torch.allclose(old(ids).logits, other(ids).logits)


UNKNOWN = {
    "hiden_size": "hidden_size",
    "n_layer": "num_hidden_layers",
    "num_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "training_length",
    "layer_norm_epsilon": "norm_eps",
    "alibi_bias_max": "alibi_max_bias",
    "tie_word_embedding": "tie_word_embeddings",
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("config_class", [AlibiGPTConfig, SinusoidalGPTConfig])
def test_an_unknown_field_is_named_with_the_nearest_real_one(config_class: type, name: str) -> None:
    with pytest.warns(UserWarning, match=rf"has no field {name} \(did you mean {UNKNOWN[name]}\?\)"):
        config_class(**{name: 3})


def test_fields_of_other_models_are_named() -> None:
    with pytest.warns(UserWarning, match=r"has no field attn_config, rope_theta. Unknown fields have no effect"):
        AlibiGPTConfig(rope_theta=1e4, attn_config={"alibi": True})


def test_an_unknown_field_in_a_saved_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "alibi_gpt", "n_layer": 3}))
    with pytest.warns(UserWarning, match="has no field n_layer"):
        AutoConfig.from_pretrained(tmp_path)


def test_an_unknown_override_of_a_saved_config_is_named() -> None:
    for name in ("hiden_size", "n_layer"):
        with pytest.warns(UserWarning, match=f"has no field {name}"):
            AutoConfig.from_pretrained(FIRST_RELEASE / "qk-norm", **{name: 3})
    with pytest.raises(TypeError, match="hiden_size"):
        AutoModelForCausalLM.from_pretrained(FIRST_RELEASE / "qk-norm", hiden_size=3)


# Warnings are errors in tests, so these tests fail if there is a warning.


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"attn_implementation": "eager", "name_or_path": "me/model", "_name_or_path": "me/model"},
        {"num_labels": 3},
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "problem_type": "regression"},
        {"max_length": 20, "temperature": 0.7, "do_sample": True, "top_k": 5},
        {"output_hidden_states": True, "return_dict": True, "architectures": ["AlibiGPTForCausalLM"]},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"auto_map": {"AutoConfig": "configuration_alibi_gpt.AlibiGPTConfig"}, "model_type": "alibi_gpt"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "task_specific_params": None, "custom_pipelines": {}},
        {"transformers_version": "4.51.0", "unsloth_version": "2025.1", "_attn_implementation_autoset": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_bookkeeping_is_no_unknown_field(fields: dict[str, Any]) -> None:
    AlibiGPTConfig(**fields)


def test_what_is_saved_loads_without_a_warning(make_model: ModelFactory, tmp_path: Path) -> None:
    model = make_model(num_labels=3, problem_type="regression").to(torch.bfloat16)
    model.config.quantization_config = {"quant_method": "none"}
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 3
    AlibiGPTConfig.from_dict(model.config.to_dict())
    AlibiGPTConfig(**model.config.to_dict())


@pytest.mark.parametrize("trainable", [False, True], ids=["fixed", "trainable"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alibi_slopes": [1e39, *[0.5] * 7]}, r"alibi_slopes are from 0.5 to 1e\+39"),
        ({"alibi_slopes": [math.inf, *[0.5] * 7]}, "alibi_slopes are from 0.5 to inf"),
        ({"alibi_slopes": [1e-46, *[0.5] * 7]}, "alibi_slopes are from 1e-46 to 0.5"),
        ({"alibi_max_bias": 3000}, "alibi_max_bias=3000 and 8 heads give slopes from 0.0"),
        ({"alibi_max_bias": 150}, "alibi_max_bias=150 and 8 heads give slopes from 7"),
        ({"alibi_max_bias": math.inf}, "alibi_max_bias must be positive and finite, got inf"),
        ({"alibi_max_bias": math.nan}, "alibi_max_bias must be positive and finite, got nan"),
        ({"alibi_scaling": {"type": "linear", "factor": 1e38}}, r"0.00390625 to 0.5, which are divided by 1e\+38"),
    ],
)
def test_slopes_that_float32_cannot_hold_are_refused(values: dict, message: str, trainable: bool) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        AlibiGPTConfig(**values, alibi_slopes_trainable=trainable)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("trainable", [False, True], ids=["fixed", "trainable"])
@pytest.mark.parametrize("slope", [2e31, 1.2e-38])
def test_the_most_extreme_slopes_compute(backend: str, trainable: bool, slope: float) -> None:
    torch.manual_seed(0)
    config = AlibiGPTConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                            initializer_range=0.2, alibi_slopes=[slope, slope, 0.5, 0.1],
                            alibi_slopes_trainable=trainable)  # fmt: skip
    model, ids = AlibiGPTForCausalLM(config).eval(), torch.arange(1400)[None] % 97
    model.set_attn_implementation(backend)
    logits = model(ids).logits.double()
    model.set_attn_implementation("eager")
    expected = model.double()(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
