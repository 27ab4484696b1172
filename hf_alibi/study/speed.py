"""Time and memory of a training step and of inference, of all methods in turns, with `benchmark/measuring.py`.

A training step has as many tokens as in the plan, in rows of the measured length. Inference reads one text of this
length without a cache. Weights are random: only learned slopes and gains, and so windows, depend on training.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..benchmark.measuring import MeasuringArguments, compare
from .training import new_model

YARDSTICK = "sinusoidal"


def training_step(config: dict[str, Any], length: int, rows: int, device: str) -> Callable[[], None]:
    """Returns a call that computes the loss of a batch and all gradients."""
    model, input_ids = _prepared(config, length, rows, device)

    def step() -> None:
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        model.zero_grad()

    return step


def inference(config: dict[str, Any], length: int, device: str) -> Callable[[], Any]:
    """Returns a call that computes the last hidden states of one text, and the logits of its last token."""
    model, input_ids = _prepared(config, length, 1, device)
    model.eval()

    @torch.no_grad()
    def read() -> Any:
        return model(input_ids=input_ids, logits_to_keep=1, use_cache=False)

    return read


def _prepared(config: dict[str, Any], length: int, rows: int, device: str) -> tuple[PreTrainedModel, torch.Tensor]:
    torch.manual_seed(0)
    model: Any = new_model(config | {"training_length": length})
    model.to(device)
    return model, torch.randint(model.config.vocab_size, (rows, length), device=device)


def measure_speed(settings: dict[str, Any], configs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a record for each method, length and task: see `measuring.compare`.

    Args:
        settings: Of the run.
        configs: The config fields of each method, by its name.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = MeasuringArguments(rounds=settings["speed"]["rounds"], device=device)
    tokens = settings["training"]["tokens_per_step"] // settings["training"]["gradient_accumulation_steps"]
    yardstick = YARDSTICK if YARDSTICK in configs else next(iter(configs))
    records = []
    for length in settings["speed"]["lengths"]:
        rows = max(1, tokens // length)
        tasks = {
            "training": (
                {name: partial(training_step, config, length, rows, device) for name, config in configs.items()},
                rows,
            ),
            "inference": ({name: partial(inference, config, length, device) for name, config in configs.items()}, 1),
        }
        for task, (calls, rows_read) in tasks.items():
            compared = compare(calls, yardstick, how, label=f"{task}, {length:,} tokens")
            for record in compared.values():
                record |= {"task": task, "length": length, "tokens": rows_read * length}
                records.append(record)
    return records
