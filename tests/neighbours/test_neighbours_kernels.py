"""Liger: its fused loss trains the same model. Triton's interpreter runs the kernel on the CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from recipes import recipe

pytest.importorskip("liger_kernel")

# Prints the losses of three steps with accumulated gradients and of the evaluation, and the largest change of a
# weight, both with and without Liger.
PROGRAM = '''
import json
import sys
import torch
import hf_alibi
from transformers import AutoModelForCausalLM

recipe = sys.argv[1].replace("use_liger_kernel=True", """use_liger_kernel=liger, use_cpu=True, max_steps=3, seed=0,
    logging_steps=1, report_to="none", save_strategy="no", optim="sgd", learning_rate=0.1,
    gradient_accumulation_steps=2, per_device_train_batch_size=2, prediction_loss_only=True""")
texts = []
for length in (4, 7, 5, 30, 12, 8):
    ids = torch.arange(30).clamp(min=30 - length) - 27 + length
    mask = (torch.arange(30) >= 30 - length).long()
    texts.append({"input_ids": ids, "labels": torch.where(mask == 1, ids, -100), "attention_mask": mask})
results = []
for liger in (True, False):
    names = {"texts": texts, "liger": liger}
    exec(recipe, names)
    trainer, model = names["trainer"], names["model"]
    logits = model.train()(texts[0]["input_ids"][None], labels=texts[0]["labels"][None]).logits
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses.append(trainer.evaluate(texts)["eval_loss"])
    results.append({
        "fused": logits is None, "losses": losses, "weights": torch.cat([w.flatten() for w in model.parameters()])
    })
moved = results[0]["weights"] - torch.cat([
    w.flatten() for w in AutoModelForCausalLM.from_pretrained("runs/books").parameters()
])
print(json.dumps({
    "fused": [result["fused"] for result in results],
    "losses": [result["losses"] for result in results],
    "difference": (results[0]["weights"] - results[1]["weights"]).abs().max().item(),
    "moved": moved.abs().max().item(),
}))
'''


def test_the_fused_loss(books: str, shown: Callable[[str, str], None]) -> None:
    (code,) = recipe("Liger")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PROGRAM, code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fused"] == [True, False]
    fused, plain = result["losses"]
    assert len(fused) == 4
    assert fused == pytest.approx(plain, rel=1e-5)
    assert result["moved"] > 1e-2
    assert result["difference"] < 1e-3 * result["moved"]
    shown(
        "liger_kernel",
        f"the loss after 3 steps without logits, {fused[-1]:.4f}, is that with logits, {plain[-1]:.4f}",
    )
