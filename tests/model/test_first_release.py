"""Checkpoints of earlier releases stay loadable.

The policy: a field, once released, keeps its name, its meaning and its default. A saved config without a new field
computes what it did before. A change that cannot be made like this is another architecture, with a ``model_type`` of
its own. In the other direction, the code that travels with a checkpoint is always of the release that saved it.

``fixtures/first-release`` was saved by release 0.1.0 and is never saved again: two models that between them take every
choice of the config, and in ``expected.safetensors`` tokens with the last logits and the greedy continuation that the
release computed from them. A release that adds choices adds a folder: ``second-release`` has ``mlp_gated``,
``clip_qkv``, ``use_parallel_residual``, ``alibi_scaling`` and ``training_length`` by that name, and ``third-release``
has ``qk_norm_gain``.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from hf_alibi import AlibiGPTConfig
from hf_alibi.hub.checkpoints import load_causal_lm

FOLDER = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = [
    "first-release/qk-norm",
    "first-release/layer-norm",
    "second-release/gated",
    "second-release/dynamic",
    "third-release/head-gains",
]


@torch.no_grad()
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_an_earlier_release_computes_what_it_did(name: str) -> None:
    model, tokenizer = load_causal_lm(FOLDER / name, device="cpu")
    expected = load_file(FOLDER / name / "expected.safetensors")
    input_ids = expected["input_ids"]
    logits = model(input_ids, logits_to_keep=expected["logits"].shape[1]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5 * logits.abs().max().item())
    mask = torch.ones_like(input_ids)
    sequence = model.generate(input_ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(sequence[:, input_ids.shape[1] :], expected["continuation"])
    assert torch.equal(tokenizer("the quick brown fox", return_tensors="pt")["input_ids"], expected["tokens"])


def test_a_config_without_gains_is_of_an_earlier_release(tmp_path: Path) -> None:
    """However it is read. A new config has another default."""
    assert AlibiGPTConfig().qk_norm_gain == "head"
    path = FOLDER / "first-release/qk-norm/config.json"
    fields = json.loads(path.read_text())
    assert "qk_norm_gain" not in fields
    configs = [
        AlibiGPTConfig.from_pretrained(path.parent),
        AlibiGPTConfig.from_json_file(path),
        AlibiGPTConfig.from_dict(fields),
        AlibiGPTConfig(**fields),
    ]
    configs[0].save_pretrained(tmp_path)
    configs.append(AlibiGPTConfig.from_pretrained(tmp_path))
    assert [config.qk_norm_gain for config in configs] == ["channel"] * 5


def test_every_field_of_the_config_is_in_a_checkpoint() -> None:
    """A new field needs a checkpoint in a folder of the release that adds it."""
    saved = {
        name for checkpoint in CHECKPOINTS for name in json.loads((FOLDER / checkpoint / "config.json").read_text())
    }
    own = {field.name for field in fields(AlibiGPTConfig)}
    assert own - {field.name for field in fields(PreTrainedConfig)} <= saved
