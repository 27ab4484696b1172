"""What a run logs about itself, how a terminal and a file show it, profiles, and stopping early."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from tiny import tiny_tokenizer
from tiny_training import TINY, tiny_blocks, write_rows
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_alibi.cli import train as train_command
from hf_alibi.errors import UserError
from hf_alibi.planning.tracing import count_operations
from hf_alibi.training import monitor
from hf_alibi.training.monitor import Monitor
from hf_alibi.training.trainer import train

pytestmark = pytest.mark.usefixtures("datasets_cache")


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def run(tmp_path: Path, model: Any, **options: Any) -> list[dict[str, Any]]:
    """Trains for 4 steps of 2 x 32 tokens, in two batches each, and returns the logs of the loss."""
    values = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no", "report_to": "none"} | options
    args = TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=1, gradient_accumulation_steps=2, use_cpu=True, **values
    )
    train(model, tiny_tokenizer(), tiny_blocks(tmp_path / "text.txt"), args)
    return [entry for entry in history(tmp_path / "run") if "loss" in entry]


def tiny_model(make_model: ModelFactory, **fields: Any) -> Any:
    return make_model(vocab_size=len(tiny_tokenizer()), **fields)


def test_every_log_of_the_loss_has_speed_memory_and_windows(tmp_path: Path, make_model: ModelFactory) -> None:
    model = tiny_model(make_model)
    first, last = run(tmp_path, model)
    for entry in (first, last):
        assert entry["grad_norm"] > 0
        flops = entry["model_tflops_per_second"] * 1e12 / entry["tokens_per_second"]
        assert flops == pytest.approx(count_operations(model.config, 1, 32).both / 32, rel=1e-3)
        assert 0.05 < entry["peak_memory_gib"] < 50
    # The last log is of the trained model.
    guarantees = model.model.window_guarantees()
    for layer, guarantee in enumerate(guarantees):
        assert last[f"score_bound/layer_{layer}"] == pytest.approx(guarantee.score_bound, abs=1e-4)
        assert last[f"window_keys/layer_{layer}"] == sum(guarantee.windows)
    assert last["score_bound"] == max(last[f"score_bound/layer_{layer}"] for layer in range(len(guarantees)))


def test_without_qk_norm_there_are_no_windows_to_log(tmp_path: Path, make_model: ModelFactory) -> None:
    entry = run(tmp_path, tiny_model(make_model, qk_norm=False))[0]
    assert entry["tokens_per_second"] > 0
    assert not any(name.startswith(("score_bound", "window_keys")) for name in entry)


def test_operations_of_frozen_weights_are_not_guessed(tmp_path: Path, make_model: ModelFactory) -> None:
    model = tiny_model(make_model)
    model.model.embed_tokens.weight.requires_grad_(False)
    entry = run(tmp_path, model)[0]
    assert entry["tokens_per_second"] > 0
    assert "model_tflops_per_second" not in entry


def test_speed_is_tokens_over_the_time_of_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_model: ModelFactory
) -> None:
    """Evaluation and saving take no time of a step, and the tokens of all processes count."""
    clock = iter([0.0, 100.0, 103.0, 200.0, 201.0, 300.0, 301.0])
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(clock))
    model, watch = tiny_model(make_model), Monitor()
    state: Any = (TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())
    watch.on_train_begin(*state)
    # The operations are counted at 100.
    watch.add({"input_ids": torch.zeros(2, 32, dtype=torch.long)}, model, ranks=4)
    watch.on_step_end(*state)
    watch.on_evaluate(*state)
    watch.add({"input_ids": torch.zeros(2, 32, dtype=torch.long)}, model, ranks=4)
    watch.on_step_end(*state)
    watch.on_save(*state)
    watch.on_step_end(*state)
    assert watch.metrics(model, state[0])["tokens_per_second"] == pytest.approx(2 * 4 * 64 / (3 + 1 + 1), abs=0.1)
    assert "tokens_per_second" not in watch.metrics(model, state[0])


class Terminal:
    """A standard error that says whether it is a terminal, and keeps what is written."""

    def __init__(self, is_terminal: bool) -> None:
        self.is_terminal = is_terminal
        self.text = ""

    def isatty(self) -> bool:
        """Returns what was said."""
        return self.is_terminal

    def write(self, text: str) -> int:
        """Keeps the text."""
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Does nothing: the text is kept at once."""


@pytest.mark.parametrize("is_terminal", [False, True], ids=["file", "terminal"])
def test_bars_are_for_terminals(
    tmp_path: Path,
    make_model: ModelFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_terminal: bool,
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal(is_terminal))
    run(tmp_path, tiny_model(make_model), disable_tqdm=False)
    printed, written = capsys.readouterr().out, sys.stderr.text  # type: ignore[attr-defined]
    assert ("4/4" in written) == ("tokens/s=" in written) == is_terminal
    if not is_terminal:
        assert [line[:15] for line in printed.splitlines() if "'loss'" in line] == [
            "{'step': '2/4',",
            "{'step': '4/4',",
        ]
    assert "'tokens_per_second'" in printed
    assert "'score_bound'" in printed
    assert "layer_0" not in printed


COMMAND = [*TINY, "--logging_steps", "1", "--report_to", "none"]


def trained(tmp_path: Path, *options: str) -> Path:
    """Runs `hf_alibi train`, and returns its folder."""
    folder = tmp_path / "run"
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        write_rows(rows)
    train_command.main([*COMMAND, "--output_dir", str(folder), "--train_file", str(rows), *options])
    return folder


def test_a_profile_has_the_operators_of_its_steps(tmp_path: Path) -> None:
    folder = trained(tmp_path, "--max_steps", "5", "--profile_steps", "2", "--save_strategy", "no")
    trace = json.loads(gzip.decompress((folder / "profile" / "rank0.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert any("attention_in_tiles_backward" in name for name in names)


def test_a_log_file_gets_lines_only(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    options = [word for word in COMMAND if word not in ("--disable_tqdm", "True")]
    command = [sys.executable, "-m", "hf_alibi", "train", *options, "--output_dir", str(tmp_path / "run")]
    command += ["--train_file", rows, "--max_steps", "3", "--save_strategy", "no"]
    written = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "\r" not in written.stdout + written.stderr
    assert "%|" not in written.stdout + written.stderr
    assert [f"'step': '{step}/3'" in written.stdout for step in (1, 2, 3)] == [True] * 3


# A rate at which nothing improves.
STUCK = ["--learning_rate", "0", "--max_steps", "20", "--load_best_model_at_end", "True"]
STUCK += ["--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "2"]


def test_training_stops_when_nothing_improves(tmp_path: Path) -> None:
    folder = trained(tmp_path, *STUCK, "--early_stopping_patience", "3")
    # The first evaluation is the best so far.
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 8


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    options = [*STUCK, "--early_stopping_patience", "3", "--lr_scheduler_type", "constant"]
    trained(tmp_path, *options, "--max_steps", "4")
    folder = trained(tmp_path, *options, "--resume_from_checkpoint", "True")
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 8
    with pytest.raises(UserError, match=r"differs in early_stopping_patience \(4, not 3\)"):
        trained(tmp_path, *options, "--early_stopping_patience", "4", "--resume_from_checkpoint", "True")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--early_stopping_patience", "0"], "--early_stopping_patience must be at least 1, got 0"),
        (["--early_stopping_patience", "2"], "needs evaluations: give --eval_strategy steps or epoch"),
        (["--early_stopping_patience", "2", "--eval_strategy", "epoch"], "needs --load_best_model_at_end True"),
        (["--early_stopping_threshold", "0.1"], "--early_stopping_threshold needs --early_stopping_patience"),
        ([*STUCK, "--early_stopping_patience", "2", "--save_steps", "3"], "saving steps to be a round multiple"),
        (["--profile_steps", "0"], "--profile_steps must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named_before_training(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trained(tmp_path, *options)
    assert not (tmp_path / "run").exists()
