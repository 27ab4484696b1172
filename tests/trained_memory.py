"""Measures the memory that Trainer needs for a run, in a process of its own.

    python tests/trained_memory.py

prints a table of predicted and measured memory for five small runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from hf_alibi.benchmark.measuring import MIB, MeasuringArguments, peak_mib
from hf_alibi.planning.memory import Setup, memory_of, trace_of
from hf_alibi.tables import markdown

STEPS = 3
# Its name since Transformers 5.24, and before.
CHECKPOINTING = (
    "activation_checkpointing"
    if any(field.name == "activation_checkpointing" for field in fields(TrainingArguments))
    else "gradient_checkpointing"
)


@dataclass(frozen=True)
class SmallRun:
    """A run, and its model as the fields of a config."""

    fields: dict[str, Any]
    setup: Setup


SHAPE = {"model_type": "alibi_gpt", "hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
SMALL_RUNS = {
    "float32": SmallRun({**SHAPE, "vocab_size": 4096}, Setup(4, 512)),
    "checkpointing": SmallRun(
        {**SHAPE, "num_hidden_layers": 8, "vocab_size": 2048}, Setup(2, 1024, checkpointing=True)
    ),
    "bfloat16": SmallRun({**SHAPE, "vocab_size": 8192}, Setup(4, 512, autocast=torch.bfloat16)),
    "accumulation": SmallRun(
        {**SHAPE, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 16384, "tie_word_embeddings": False},
        Setup(1, 256, accumulation=2),
    ),
    "gated, LayerNorm, SGD": SmallRun(
        {**SHAPE, "mlp_gated": True, "hidden_act": "silu", "norm_type": "layernorm", "num_key_value_heads": 2}
        | {"attention_bias": True, "intermediate_size": 2048, "vocab_size": 1024},
        Setup(2, 1024, optimizer="sgd"),
    ),
}  # fmt: skip


def predicted_mib(run: SmallRun) -> float:
    """Returns what the plan says."""
    config = AutoConfig.for_model(**run.fields)
    return memory_of(trace_of(config, run.setup), run.setup).total / MIB


def measured_mib(run: SmallRun) -> float:
    """Returns the most memory that the process takes beyond a tiny run that came before."""
    how = MeasuringArguments(device="cpu")
    return peak_mib(partial(_prepared, run), how)


def _prepared(run: SmallRun) -> Callable[[], object]:
    width = 8 * run.fields["num_attention_heads"]
    tiny = SmallRun({**run.fields, "hidden_size": width, "intermediate_size": 32, "vocab_size": 64}, run.setup)
    _train(tiny, 8)
    return partial(_train, run, run.setup.length)


def _train(run: SmallRun, length: int) -> None:
    """Trains with Trainer for a few steps."""
    setup = run.setup
    config = AutoConfig.for_model(**run.fields)
    model = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
    ids = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids, "labels": ids}] * (STEPS * setup.batch * setup.accumulation)
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            str(Path(folder)),
            max_steps=STEPS,
            per_device_train_batch_size=setup.batch,
            gradient_accumulation_steps=setup.accumulation,
            **{CHECKPOINTING: setup.checkpointing},
            bf16=setup.autocast is not None,
            optim=setup.optimizer,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, args, train_dataset=rows, data_collator=default_data_collator)
        trainer.train()
    assert trainer.state.global_step == STEPS


def main() -> None:
    """Prints the table."""
    rows = []
    for name, run in SMALL_RUNS.items():
        predicted, measured = predicted_mib(run), measured_mib(run)
        rows.append([name, f"{predicted:.0f}", f"{measured:.0f}", f"{predicted / measured - 1:+.1%}"])
    print(markdown(["run", "predicted MiB", "measured MiB", "difference"], rows))


if __name__ == "__main__":
    main()
