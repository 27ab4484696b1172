"""Tensor parallelism: every rank adds the slopes of its own heads, and gradients are those of all ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ModelFactory
from safetensors.torch import load_file

PROGRAM = """
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DistributedConfig

import hf_alibi

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
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [False, True], ids=["fixed slopes", "trainable slopes"])
@pytest.mark.parametrize("heads", [(6, 6), (12, 4)], ids=["6-heads", "12-heads-grouped"])
def test_two_ranks_compute_what_one_does(
    make_model: ModelFactory, tmp_path: Path, heads: tuple[int, int], trainable: bool
) -> None:
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "clip_qkv": 1.0}
    model = make_model(alibi_slopes_trainable=trainable, mlp_gated=True, mlp_bias=True, hidden_act="silu", **shape)
    model.save_pretrained(tmp_path / "model")
    program, result = tmp_path / "program.py", tmp_path / "result.safetensors"
    program.write_text(PROGRAM)
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program), str(tmp_path / "model")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *command, str(result)], check=True, env=environment, timeout=300)
    parallel = load_file(result)
    input_ids = torch.arange(3, 63)[None]
    expected = model(input_ids).logits
    torch.testing.assert_close(parallel["logits"], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(parallel["generated"], model.generate(input_ids, max_new_tokens=8))
    model(input_ids, labels=input_ids).loss.backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(parallel[name], parameter.grad, rtol=0, atol=1e-4 * scale, msg=name)
