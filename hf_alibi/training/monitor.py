"""What a run logs beside Trainer's loss, learning rate and gradient norm, and how the terminal shows it.

`SafeTrainer` adds these metrics to each log of the training loss, so they also reach the tools in `report_to`:

- `tokens_per_second`: of all processes, since the last log. Time of evaluation and saving does not count.
- `model_tflops_per_second`: operations of the model in 10^12 a second, of all processes. They are those of the forward
  and the backward pass, with attention to all earlier keys. Layers that are computed again do not count.
- `mfu`: the same as a part of the peak speed of the GPUs, if `planning/gpus.py` has them.
- `peak_memory_gib`: The most memory that this process has held, of its GPU if it has one.
- `score_bound/layer_N` and `window_keys/layer_N`: U in nats, and how many keys a query looks at in all heads together.
  The terminal shows neither, but the largest U, `score_bound`.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from ..model.configuration_alibi_gpt import AlibiGPTConfig
from ..planning.gpus import known_gpu
from ..planning.memory import GIB, MIB, peak_mib
from ..planning.tracing import count_operations
from .watching import window_record

logger = logging.getLogger(__name__)

# Steps before those of a profile: the first ones load and compile.
STEPS_BEFORE_PROFILE = 2


class Monitor(TrainerCallback):
    """Measures tokens and time of the steps since the last log."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._since: float | None = None
        self._flops_a_token: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self.tokens, self.seconds, self._since = 0, 0.0, time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the time since the last step."""
        now = time.perf_counter()
        self.seconds += now - (self._since or now)
        self._since = now

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves out the time of the evaluation."""
        self._since = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves out the time of saving."""
        self._since = time.perf_counter()

    def add(self, inputs: dict[str, Any], model: PreTrainedModel, ranks: int) -> None:
        """Counts the tokens of a batch, which is one of those that `ranks` processes train on at the same time."""
        ids = inputs.get("input_ids")
        if ids is None:
            return
        self.tokens += ids.numel() * ranks
        if self._flops_a_token is None:
            self._flops_a_token = _flops_a_token(model, ids.shape[0], ids.shape[1])
            # The count is no part of a step.
            self._since = time.perf_counter()

    def metrics(self, model: PreTrainedModel, args: TrainingArguments) -> dict[str, float]:
        """Returns the metrics since the last call."""
        found: dict[str, float] = {}
        if self.tokens and self.seconds:
            speed = self.tokens / self.seconds
            found["tokens_per_second"] = round(speed, 1)
            if self._flops_a_token:
                flops = speed * self._flops_a_token
                found["model_tflops_per_second"] = float(f"{flops / 1e12:.5g}")
                if (peak := _peak_flops(args, model)) is not None:
                    found["mfu"] = round(flops / peak, 4)
        found["peak_memory_gib"] = round(peak_mib() * MIB / GIB, 3)
        self.tokens, self.seconds = 0, 0.0
        return found | window_metrics(model)


def window_metrics(model: PreTrainedModel) -> dict[str, float]:
    """Returns U and the keys in the head windows of each layer, or nothing if they do not follow from the weights."""
    record = window_record(model)
    if record is None:
        return {}
    found = {"score_bound": max(record["score_bound"])}
    for layer, (bound, keys) in enumerate(zip(record["score_bound"], record["keys"], strict=True)):
        found |= {f"score_bound/layer_{layer}": bound, f"window_keys/layer_{layer}": keys}
    return found


def _flops_a_token(model: PreTrainedModel, batch: int, length: int) -> float:
    """Returns the operations of training for each token, 0 for models whose operations are unknown.

    These are other architectures, and models with frozen weights, which need fewer in the backward pass. With ZeRO-3,
    Transformers divides every new model among the ranks, also one without data.
    """
    is_whole = all(weight.requires_grad for weight in model.parameters())
    if not is_whole or not isinstance(model.config, AlibiGPTConfig) or is_deepspeed_zero3_enabled():
        return 0
    return count_operations(model.config, batch, length).both / (batch * length)


def _peak_flops(args: TrainingArguments, model: PreTrainedModel) -> float | None:
    """Returns the peak speed of all GPUs, or `None` if it is unknown."""
    gpu = known_gpu(torch.cuda.get_device_name(args.device)) if args.device.type == "cuda" else None
    if gpu is None:
        return None
    is_short = args.bf16 or args.fp16 or model.dtype.itemsize == 2
    return (gpu.tflops_16 if is_short else gpu.tflops_32) * 1e12 * args.world_size


def no_bars_in_files() -> None:
    """Turns off the bars of datasets and Transformers in this process, unless the standard error is a terminal."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()


def shown(logs: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a log that a terminal has room for: nothing by layer."""
    return {name: value for name, value in logs.items() if "/" not in name}


class Bars(ProgressCallback):
    """Trainer's progress bars, with loss and speed in the bar."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the log above the bar."""
        logs = shown(logs or {})
        if self.training_bar is not None:
            names = {"loss": "loss", "tokens_per_second": "tokens/s"}
            self.training_bar.set_postfix(
                {short: f"{logs[name]:.4g}" for name, short in names.items() if name in logs}
            )
        super().on_log(args, state, control, logs=logs, **kwargs)


class Lines(PrinterCallback):
    """A line for each log, with its step, and no bars: for a log file."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Prints the log."""
        line = {"step": f"{state.global_step}/{state.max_steps}"} | shown(logs or {})
        super().on_log(args, state, control, logs=line, **kwargs)


class Profile(TrainerCallback):
    """Writes a trace of a few steps to `profile/` in the output folder, for Perfetto or chrome://tracing.

    Args:
        steps: How many steps, after the first `STEPS_BEFORE_PROFILE` of this process.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._profiler: Any = None
        self._path: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to count steps."""
        left = state.max_steps - state.global_step
        if left < STEPS_BEFORE_PROFILE + self.steps:
            logger.warning(
                "--profile_steps %d needs %d steps, but %d are left: there will be no complete profile",
                self.steps, STEPS_BEFORE_PROFILE + self.steps, left,
            )  # fmt: skip
        self._path = Path(str(args.output_dir)) / "profile" / f"rank{args.process_index}.json.gz"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device.type == "cuda")
        plan = schedule(wait=STEPS_BEFORE_PROFILE - 1, warmup=1, active=self.steps, repeat=1)
        self._profiler = profile(activities=kinds, schedule=plan, on_trace_ready=self._write, record_shapes=True)
        self._profiler.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts a step."""
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops, if the steps were too few."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: Any) -> None:
        profiler.export_chrome_trace(str(self._path))
