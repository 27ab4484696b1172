"""Several processes: each uses the slopes and windows of its own heads, computed from whole weights.

`ranks_infer.py` has tensor and pipeline parallelism. Training is in `tests/training/test_ranks.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from safetensors.torch import load_file
from several_processes import in_processes
from transformers import AutoModelForCausalLM

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.positions import FoxGPTConfig, KerpleGPTConfig

PROGRAM = """
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DistributedConfig

import hf_alibi.positions
from hf_alibi.training.processes import end_together

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 48
input_ids = torch.arange(3, 63)[None]
with torch.no_grad():
    logits = model(input_ids).logits
    cached = model.generate(input_ids, max_new_tokens=8)
model(input_ids, labels=input_ids).loss.backward()
gradients = {}
for name, parameter in model.named_parameters():
    gradient = parameter.grad
    gradients[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
if dist.get_rank() == 0:
    save_file({"logits": logits, "generated": cached} | gradients, sys.argv[2])
end_together()
"""

SHARDED = """
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

import hf_alibi
from hf_alibi.training.processes import end_together

dist.init_process_group("gloo")
assert dist.get_world_size() == 2
input_ids = torch.arange(1300)[None] % 97


def sharded(policy):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    for layer in model.model.layers:
        fully_shard(layer.self_attn.q_norm, mp_policy=policy)  # a norm by itself, too
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


results = {}
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for implementation in ("sdpa", "eager"):
    model = sharded(policy)
    model.set_attn_implementation(implementation)
    assert model.model.windowed_cache() is None and model.model.window_guarantees() is None
    mask = torch.where(torch.ones(1300, 1300).tril() > 0, 0.25, torch.finfo(torch.float32).min)[None, None]
    for name, inputs in {"plain": {}, "masked": {"attention_mask": mask}}.items():
        if model.config.alibi_slopes_trainable:
            try:
                model(input_ids, **inputs)
            except ValueError as error:
                assert "under torch.autocast" in str(error), error
            else:
                raise AssertionError("slopes in bfloat16 are used")
        else:
            output = model(input_ids, labels=input_ids, use_cache=False, **inputs)
            output.loss.backward()
            results[f"{implementation} {name}"] = output.logits.detach()
    model = sharded(MixedPrecisionPolicy())
    model.set_attn_implementation(implementation)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids, labels=input_ids, use_cache=False)
    output.loss.backward()
    results[f"{implementation} autocast"] = output.logits.detach()
    for name, parameter in model.named_parameters():
        results[f"{implementation} gradient {name}"] = parameter.grad.full_tensor()
    results[f"{implementation} generated"] = model.generate(input_ids[:, :50], max_new_tokens=5, do_sample=False)
if dist.get_rank() == 0:
    save_file({name: value.contiguous() for name, value in results.items()}, sys.argv[2])
end_together()
"""


SHAPE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}


@pytest.mark.slow
def test_two_shares_and_two_stages_compute_what_one_process_does(tmp_path: Path) -> None:
    output = in_processes(Path(__file__).with_name("ranks_infer.py"), tmp_path)
    # No rule of the plan is for modules that the models do not have.
    assert "match nothing" not in output


@pytest.mark.parametrize(
    "config",
    [
        AlibiGPTConfig(**SHAPE),
        AlibiGPTConfig(mlp_gated=True, **SHAPE),
        AlibiGPTConfig(qk_norm=False, norm_type="layernorm", embedding_norm=True, **SHAPE),
        FoxGPTConfig(**SHAPE),
    ],
    ids=["plain", "gated", "without QK-norm", "fox"],
)
def test_the_plan_of_shares_is_for_the_modules_of_the_model(config: AlibiGPTConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    attention = {name for name, module in model.model.layers[1].self_attn.named_modules() if list(module.parameters())}
    feed_forward = {name for name, module in model.model.layers[1].mlp.named_modules() if list(module.parameters())}
    parts = {f"self_attn.{name}" for name in attention - {""}} | {f"mlp.{name}" for name in feed_forward - {""}}
    rules = {f"model.layers.*.{part}" for part in parts} | {"lm_head"}
    # Transformers 5.24 adds a rule for the embeddings itself.
    assert rules == model.tp_plan.keys() - {"model.embed_tokens"}
    # The plan of the class stays complete.
    assert "layers.*.mlp.gate_proj" in type(config).base_model_tp_plan


@pytest.mark.slow
@pytest.mark.parametrize("config_class", [KerpleGPTConfig, FoxGPTConfig])
def test_two_ranks_have_the_biases_of_their_heads(config_class: type[AlibiGPTConfig], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = config_class(initializer_range=0.2, num_key_value_heads=2, **SHAPE)
    model = AutoModelForCausalLM.from_config(config).eval()
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.self_attn.q_norm.weight, 0.5, 2)
    check_two_ranks(model, tmp_path)


def check_two_ranks(model: AlibiGPTForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    program, result = tmp_path / "program.py", tmp_path / "result.safetensors"
    program.write_text(PROGRAM)
    in_processes(program, tmp_path / "model", result)
    parallel = load_file(result)
    input_ids = torch.arange(3, 63)[None]
    expected = model(input_ids).logits
    torch.testing.assert_close(parallel["logits"], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(parallel["generated"], model.generate(input_ids, max_new_tokens=8))
    model(input_ids, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(parallel[name], parameter.grad, rtol=0, atol=1e-4 * scale, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [False, True], ids=["fixed slopes", "trainable slopes"])
def test_two_shards_compute_what_one_process_does(make_model: ModelFactory, tmp_path: Path, trainable: bool) -> None:
    """FSDP2 is exact, with mixed precision to the last bit: slopes and masks are not rounded, windows are wide enough.

    Sharded trained slopes would be rounded, so they are refused, and the remedy in the error message works.
    """
    make_model(hidden_size=48, alibi_slopes_trainable=trainable).save_pretrained(tmp_path / "model")
    program, result = tmp_path / "program.py", tmp_path / "result.safetensors"
    program.write_text(SHARDED)
    in_processes(program, tmp_path / "model", result)
    sharded = load_file(result)
    input_ids = torch.arange(1300)[None] % 97
    mask = torch.where(torch.ones(1300, 1300).tril() > 0, 0.25, torch.finfo(torch.float32).min)[None, None]
    for implementation in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids, labels=input_ids, use_cache=False)
        output.loss.backward()
        assert torch.equal(sharded[f"{implementation} autocast"], output.logits)
        for name, parameter in model.named_parameters():
            scale = parameter.grad.abs().max().item()
            found = sharded[f"{implementation} gradient {name}"]
            torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-5 * scale, msg=name)
        generated = model.generate(input_ids[:, :50], max_new_tokens=5, do_sample=False)
        assert torch.equal(sharded[f"{implementation} generated"], generated)
        if not trainable:
            low = model.bfloat16()
            with torch.no_grad():
                assert torch.equal(sharded[f"{implementation} plain"], low(input_ids, use_cache=False).logits)
                masked = low(input_ids, attention_mask=mask, use_cache=False).logits
            assert torch.equal(sharded[f"{implementation} masked"], masked)
