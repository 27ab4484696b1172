"""DeepSpeed: two processes on the CPU that share a model by ZeRO train it as one process does."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several_processes import launched
from tiny import VOCAB_SIZE, save_checkpoint, tiny_tokenizer
from tiny_training import write_rows
from transformers import AutoModelForCausalLM

from hf_alibi import AlibiGPTConfig

ARGUMENTS = ["--block_size", "16", "--use_cpu", "--disable_tqdm", "True", "--isolate_documents", "--report_to", "none"]
ARGUMENTS += ["--learning_rate", "0.001", "--logging_steps", "1", "--max_eval_samples", "12", "--max_steps", "20"]
ARGUMENTS += ["--save_steps", "10", "--per_device_eval_batch_size", "2"]
TWO = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]


def trained(folder: Path, launcher: list[str], *options: str) -> list[dict[str, Any]]:
    """Runs `hf_alibi train`, and returns the logs of its losses."""
    variables = {"DS_ACCELERATOR": "cpu", "HF_DATASETS_CACHE": str(folder.parent / "cache")}
    command = [sys.executable, "-m", *launcher, "hf_alibi", "train", *ARGUMENTS, "--output_dir", str(folder)]
    launched([*command, *options], **variables)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_train_as_one_does(tmp_path: Path, shown: Callable[[str, str], None], stage: int) -> None:
    """Losses and saved weights are those of one process, and a run that was killed ends with the same weights."""
    pytest.importorskip("deepspeed")
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12}
    tokens = {"eos_token_id": tiny_tokenizer().eos_token_id, "initializer_range": 0.1}
    start = save_checkpoint(tmp_path / "start", AlibiGPTConfig(alibi_slopes_trainable=True, **shape, **tokens))
    source = ["--model_name_or_path", str(start), "--train_file", write_rows(tmp_path / "rows.jsonl")]
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = tmp_path / "deepspeed.json"
    config.write_text(json.dumps(dict.fromkeys(automatic, "auto") | {"zero_optimization": zero}))

    one = trained(tmp_path / "one", [], *source, "--per_device_train_batch_size", "2")
    shared = [*source, "--per_device_train_batch_size", "1", "--deepspeed", str(config)]
    two = trained(tmp_path / "two", TWO, *shared)
    run = json.loads((tmp_path / "two" / "checkpoint-20" / "training_run.json").read_text())
    assert run["arguments"]["processes"] == 2
    assert [entry["loss"] for entry in two] == pytest.approx([entry["loss"] for entry in one], abs=1e-4)
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two")]
    assert results[1]["eval_perplexity"] == pytest.approx(results[0]["eval_perplexity"], rel=1e-4)
    # The gains are in parts with ZeRO-3, and no metric follows from parts.
    for found, right in zip(two, one, strict=True):
        watched = {name: value for name, value in right.items() if name.startswith(("score_bound", "window_keys"))}
        assert len(watched) == 5
        if stage == 3:
            assert not watched.keys() & found.keys()
            assert "model_tflops_per_second" not in found
        else:
            assert {name: found[name] for name in watched} == pytest.approx(watched, abs=1e-3)

    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two")]
    input_ids = torch.arange(40)[None]
    with torch.no_grad():
        right, found = (model(input_ids).logits for model in models)
    torch.testing.assert_close(found, right, rtol=0, atol=2e-3)

    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-20")
    trained(tmp_path / "resumed", TWO, *shared, "--resume_from_checkpoint", "True")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "resumed"))
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    error = max(abs(found["loss"] - right["loss"]) for found, right in zip(two, one, strict=True))
    shown(
        "deepspeed",
        f"ZeRO-{stage} in two processes: losses of 20 steps to {error:.0e}; a continued run has the same weights",
    )
