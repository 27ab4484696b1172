"""Trains the model of a run with Trainer: the same text in the same order for every method and length.

The training text is cut into chunks of the longest training length. The seed decides their order. A run with shorter
rows cuts the chunks further, so every run with this seed reads the same tokens in the same steps.
"""

import math
import os
import time
import warnings
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ..errors import UserError
from ..hub.checkpoints import LOADING_ERRORS
from ..planning.tracing import parameters
from ..training.watching import window_record
from .associative import with_pairs

# Points of the training loss along a run.
LOSSES = 50


class Rows(Dataset):
    """Rows of `length` tokens in the order that the seed decides, as many as a run needs. Text that ends is repeated.

    Args:
        tokens: The training text.
        length: Tokens in a row.
        chunk: Tokens that stay together when the text is shuffled, a multiple of `length`.
        total: Tokens of the run.
        seed: Decides the order; None for the order of the text.
        pairs: Pairs of the associative-recall task in each row; 0 for plain text.
    """

    def __init__(
        self, tokens: np.ndarray, length: int, chunk: int, total: int, seed: int | None, pairs: int = 0
    ) -> None:
        self.tokens, self.length, self.chunk, self.seed, self.pairs = tokens, length, chunk, seed, pairs
        self.rows = total // length
        chunks, wanted = len(tokens) // chunk, -(-total // chunk)
        orders = [
            np.arange(chunks) if seed is None else np.random.default_rng([seed, number]).permutation(chunks)
            for number in range(-(-wanted // max(1, chunks)))
        ]
        self.order = np.concatenate(orders)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin = index * self.length
        start = self.order[begin // self.chunk] * self.chunk + begin % self.chunk
        row = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        if self.pairs:
            return with_pairs(row, self.pairs, np.random.default_rng([self.seed or 0, index]))
        return {"input_ids": row, "labels": row}


class Watcher(TrainerCallback):
    """Records the windows along training, and ends the process if the study that started it has been killed.

    Attributes:
        records: One for each point.
        seconds: Time that recording took.
        cpu_seconds: Time that all threads together were busy with steps. Other work on the machine hardly changes it.
    """

    def __init__(self, steps: int, points: int, parent: int) -> None:
        self.at = {round(steps * point / points) for point in range(points + 1)}
        self.records: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.cpu_seconds = 0.0
        self.parent = parent

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Records the new model."""
        self._record(0, kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the time."""
        self.begun = time.process_time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Records the model at the chosen steps."""
        self.cpu_seconds += time.process_time() - self.begun
        if os.getppid() != self.parent:
            raise SystemExit("the study that started this run has ended")
        if state.global_step in self.at:
            self._record(state.global_step, kwargs["model"])

    def _record(self, step: int, model: PreTrainedModel) -> None:
        start = time.perf_counter()
        record = window_record(model)
        if record is not None:
            self.records.append({"step": step, **record})
        self.seconds += time.perf_counter() - start


def new_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """Returns a config from its fields and `model_type`. Raises `UserError` for values that it refuses."""
    try:
        with warnings.catch_warnings():
            # A field that the model does not know has no effect, so it is a mistake in the plan.
            warnings.simplefilter("error")
            return AutoConfig.for_model(**fields)
    except (*LOADING_ERRORS, UserWarning) as error:
        raise UserError(f"the plan asks for an impossible model: {shorten(str(error), 200)}") from error


def new_model(fields: dict[str, Any]) -> PreTrainedModel:
    """Returns a model with new weights in float32, from the fields of its config."""
    return AutoModelForCausalLM.from_config(new_config(fields), dtype=torch.float32)


def finite(loss: float) -> float | None:
    """Returns a loss, or None if training has diverged: JSON has no other number."""
    return loss if math.isfinite(loss) else None


def _arguments(settings: dict[str, Any], folder: Path, steps: int) -> TrainingArguments:
    """Returns Trainer's arguments for a run of so many steps."""
    how = settings["training"]
    rows = how["tokens_per_step"] // how["gradient_accumulation_steps"] // settings["training_length"]
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=how["gradient_accumulation_steps"],
        train_sampling_strategy="sequential",
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=round(how["warmup_fraction"] * steps),
        weight_decay=how["weight_decay"],
        adam_beta2=how["adam_beta2"],
        max_grad_norm=how["max_grad_norm"],
        bf16=how["bf16"],
        # Trainer refuses bfloat16 on a CPU otherwise.
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=max(1, steps // LOSSES),
        eval_strategy="steps",
        eval_steps=max(1, steps // how["evaluations"]),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=settings["seed"],
    )


def train_run(
    settings: dict[str, Any], text: Path, folder: Path, parent: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Trains the model of a run.

    Args:
        settings: See `runs.settings`.
        text: Folder with the tokens.
        folder: Where Trainer may write.
        parent: The process of the study. Training ends when it does.

    Returns:
        The model, and its record: losses in nats per token along training, tokens, seconds and tokens per second
        without evaluations, seconds of the CPU in steps, parameters, and the windows along training.
    """
    how, length = settings["training"], settings["training_length"]
    tokens, pairs = np.load(text / "train.npy", mmap_mode="r"), settings.get("recall", {}).get("pairs", 0)
    steps = max(1, settings["tokens"] // how["tokens_per_step"])
    total = steps * how["tokens_per_step"]
    held_out = np.load(text / "validation.npy", mmap_mode="r")[: how["evaluation_tokens"]]
    set_seed(settings["seed"])
    model = new_model(settings["config"])
    model.config.use_cache = False
    watcher = Watcher(steps, settings["points"], parent)
    args = _arguments(settings, folder, steps)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Rows(tokens, length, how["chunk"], total, settings["seed"], pairs),
        eval_dataset=Rows(held_out, length, length, len(held_out) // length * length, None),
        data_collator=default_data_collator,
        callbacks=[watcher],
    )
    finished = trainer.train().metrics
    model.config.use_cache = True
    log = trainer.state.log_history
    # Trainer evaluates after the last step too.
    evaluations = [entry for entry in log if "eval_loss" in entry]
    seconds = finished["train_runtime"] - watcher.seconds - sum(entry["eval_runtime"] for entry in evaluations)
    return model.eval(), {
        "losses": [[entry["step"], finite(entry["loss"])] for entry in log if "loss" in entry],
        "evaluations": [[entry["step"], finite(entry["eval_loss"])] for entry in evaluations],
        "steps": steps,
        "tokens": total,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(total / seconds, 1),
        "cpu_seconds": round(watcher.cpu_seconds, 2),
        "parameters": parameters(model),
        "windows": watcher.records,
    }
