"""Checkpoints that load, and checkpoints that raise an error of one sentence."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import edit_config, edit_weights, pickle_weights
from safetensors.torch import load_file
from tiny import save_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, T5Config

from hf_alibi import AlibiGPTForCausalLM
from hf_alibi.errors import UserError
from hf_alibi.hub.checkpoints import load_causal_lm
from hf_alibi.positions.sinusoidal import SinusoidalGPTConfig, SinusoidalGPTForCausalLM

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """Returns a copy that tests may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def keep_bytes(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def test_what_was_saved_is_loaded(tiny_checkpoint: Path) -> None:
    model, tokenizer = load_causal_lm(tiny_checkpoint, device="cpu")
    saved = load_file(tiny_checkpoint / "model.safetensors")
    assert isinstance(model, AlibiGPTForCausalLM)
    assert not model.training
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in saved.items())
    assert tokenizer.decode(tokenizer("the lazy dog")["input_ids"]) == "the lazy dog"


def test_dtype_and_attention_are_those_asked_for(tiny_checkpoint: Path) -> None:
    model, _ = load_causal_lm(tiny_checkpoint, device="cpu", dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_fields_of_the_config_can_be_changed(tiny_checkpoint: Path) -> None:
    changes = "alibi_scaling={'type': 'linear', 'factor': 2.5}, window_tolerance=0,alibi_slopes=[0.5, 0.25,0.1,1]"
    model, _ = load_causal_lm(tiny_checkpoint, device="cpu", config_overrides=changes)
    assert model.config.alibi_scaling == {"type": "linear", "factor": 2.5}
    assert model.config.window_tolerance == 0
    assert model.config.slopes == [0.5, 0.25, 0.1, 1.0]


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (
            LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2),
            LlamaForCausalLM,
        ),
        (SinusoidalGPTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2), SinusoidalGPTForCausalLM),
    ],
    ids=["llama", "sinusoidal"],
)
def test_other_causal_models_load_too(config: PreTrainedConfig, model_class: type, tmp_path: Path) -> None:
    assert type(load_causal_lm(save_checkpoint(tmp_path, config), device="cpu")[0]) is model_class


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no folder here"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda folder: keep_bytes(folder / "config.json", 20), "not a valid JSON file"),
    "impossible config": (lambda folder: edit_config(folder, num_key_value_heads=3), "cannot share 3 key-value heads"),
    "unknown architecture": (lambda folder: edit_config(folder, model_type="nonesuch", auto_map={}), "`nonesuch`"),
    "code of its own": (lambda folder: edit_config(folder, model_type="nonesuch"), "allow it with trust_remote_code"),
    "no causal model": (lambda folder: T5Config().save_pretrained(folder), "AutoModelForCausalLM"),
    "another causal model": (lambda folder: edit_config(folder, model_type="llama"), "lacks .* of the weights"),
    "truncated weights": (lambda folder: keep_bytes(folder / "model.safetensors", 9_000), "file not fully covered"),
    "empty weights": (lambda folder: keep_bytes(folder / "model.safetensors", 0), "header too small"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has no \*\.safetensors weights"),
    "pickled weights only": (pickle_weights, "pickled weights can run code"),
    "a weight missing": (lambda folder: edit_weights(folder, lambda w: w.pop(WEIGHT)), f"lacks {WEIGHT}"),
    "a wrong shape": (
        lambda folder: edit_weights(folder, lambda w: w.update({WEIGHT: torch.zeros(3, 5)})),
        rf"{WEIGHT} has shape \[3, 5\], but its config asks for \[128, 32\]",
    ),
    "no tokenizer": (remove_tokenizer, "cannot load a tokenizer"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_CHECKPOINTS.values(), ids=BAD_CHECKPOINTS.keys())
def test_bad_checkpoints_are_refused_in_a_line(
    damage: Callable[[Path], Any], message: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(checkpoint)
    with pytest.raises(UserError, match=message) as error_info:
        load_causal_lm(checkpoint, device="cpu")
    assert str(checkpoint) in str(error_info.value)
    assert "\n" not in str(error_info.value)
    assert not caplog.records


def test_a_tokenizer_beyond_the_model_is_refused(checkpoint: Path) -> None:
    _, tokenizer = load_causal_lm(checkpoint, device="cpu")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(UserError, match="has 291 tokens, more than the 290"):
        load_causal_lm(checkpoint, device="cpu")


def test_weights_without_a_place_are_named(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(checkpoint, lambda weights: weights.update(extra=torch.zeros(2)))
    load_causal_lm(checkpoint, device="cpu")
    assert "ignored extra" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_types": ["llama", "bloom"]}, "is a 'alibi_gpt' checkpoint; expected bloom or llama"),
        ({"attn_implementation": "nonesuch"}, "nonesuch"),
        ({"dtype": "float7"}, "dtype"),
        ({"device": "nonesuch"}, "device 'nonesuch' is not available"),
        ({"device": "meta"}, "device 'meta' holds no data"),
        ({"config_overrides": "alibi_scale=2"}, "alibi_gpt has no field 'alibi_scale'"),
        ({"config_overrides": "slopes=[1]"}, "alibi_gpt has no field 'slopes'"),
        ({"config_overrides": "alibi_scaling={'type': 'linear'}"}, "alibi_scaling must be None, .*'linear'}"),
        ({"config_overrides": "window_tolerance=2"}, "window_tolerance must be at least 0 and below 1"),
        ({"config_overrides": "intermediate_size=64"}, "but its config asks for"),
    ],
    ids=["model type", "attention", "dtype", "device", "no data", "field", "property", "value", "range", "shape"],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str, tiny_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_causal_lm(tiny_checkpoint, **({"device": "cpu"} | arguments))
