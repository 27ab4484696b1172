"""`hf_alibi train` refuses options that would fail late, before it reads data or writes anything."""

from pathlib import Path

import pytest
import torch
from conftest import ModelFactory
from tiny_training import write_rows
from transformers import TrainingArguments

from hf_alibi.cli.train import main, try_out
from hf_alibi.errors import UserError

SIZE = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2"
TINY = ["--config_overrides", SIZE, "--vocab_size", "300", "--block_size", "16", "--use_cpu", "--max_steps", "1"]

BAD_OPTIONS = {
    "results apart": (["--eval_do_concat_batches", "False"], "needs --eval_do_concat_batches True"),
    "results by batch": (["--batch_eval_metrics", "True"], "needs .*--batch_eval_metrics False"),
    "no batch": (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1, got 0"),
    "no batch to evaluate": (
        ["--per_device_eval_batch_size", "-1"],
        "--per_device_eval_batch_size must be at least 1",
    ),
    "no accumulation": (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1"),
    "negative learning rate": (["--learning_rate", "-1"], "--learning_rate must be from 0 to"),
    "infinite learning rate": (["--learning-rate", "inf"], "--learning_rate must be from 0 to"),
    "learning rate that is no number": (["--learning_rate", "nan"], "--learning_rate must be a number, got nan"),
    "beta": (["--adam_beta2", "1.5"], "--adam_beta2 must be from 0 to 1, got 1.5"),
    "seed": (["--seed", "-1"], "--seed must be from 0 to 4294967295"),
    "held out": (["--validation_split_percentage", "100"], "--validation_split_percentage must be from 0 to 99"),
    "no blocks": (["--max_train_samples", "0"], "--max_train_samples must be at least 1, got 0"),
    "no blocks to evaluate": (["--max_eval_samples", "0"], "--max_eval_samples must be at least 1, got 0"),
    "configuration of nothing": (["--dataset_config_name", "x"], "--dataset_config_name needs --dataset_name"),
    "empty name": (["--model_name_or_path", ""], "--model_name_or_path is empty"),
    "padding": (["--config_overrides", f"{SIZE},pad_token_id=300"], "300 tokens, but no pad_token_id 300"),
    "end of text": (["--config_overrides", f"{SIZE},eos_token_id=-1"], "300 tokens, but no eos_token_id -1"),
    "no backward pass": (["--attn_implementation", "flex_attention"], "cannot be trained on the CPU: flex_attention"),
    "another package": (["--optim", "adamw_bnb_8bit"], "--optim adamw_bnb_8bit: .*bitsandbytes"),
    "arguments of the optimizer": (["--optim_args", "xx"], "--optim .*not enough values"),
    "arguments of the schedule": (["--lr_scheduler_kwargs", "xx"], "--lr_scheduler_kwargs must be a JSON object"),
    "compiling": (["--torch_compile_mode", "xx"], "--torch_compile: Unrecognized mode=xx"),
    "labels": (["--label_names", "targets"], "the labels are called labels here"),
    "workers": (["--dataloader_persistent_workers", "True"], "needs --dataloader_num_workers"),
    "another package for kernels": (["--use_liger_kernel", "True"], "needs a GPU, and the package: .*liger-kernel"),
    "no logits to smooth": (["--use_liger_kernel", "True", "--label_smoothing_factor", "0.1"], "leave one out"),
    "text of another type": (["--train_file", "{numbers}"], "numbers.jsonl: the column .* int further on: 5"),
    "unknown": (["--learning_rat", "1"], "--learning_rat.*"),
    "not this one": (["--bf16", "perhaps"], "argument --bf16: Truthy value expected"),
}


@pytest.fixture
def rows(tmp_path: Path, datasets_cache: None) -> str:
    return write_rows(tmp_path / "rows.jsonl", 50)


@pytest.mark.parametrize(("arguments", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_are_refused(rows: str, tmp_path: Path, arguments: list[str], message: str) -> None:
    output = tmp_path / "run"
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": "one"}\n{"text": 5}\n')
    arguments = [argument.format(numbers=numbers) for argument in arguments]
    with pytest.raises(UserError, match=message):
        main(["--output_dir", str(output), "--train_file", rows, *TINY, *arguments])
    assert not output.exists() or not any(output.iterdir())


def test_streamed_text_that_is_broken_further_on_ends_in_a_line(rows: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    options = ["--output_dir", str(tmp_path / "run"), *TINY, "--streaming", "--validation_split_percentage", "0"]
    with pytest.raises(UserError, match="cannot read"):
        main([*options, "--train_file", str(tmp_path / "broken.jsonl")])


@pytest.fixture
def training_args(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True)


def test_trying_out_changes_nothing(make_model: ModelFactory, training_args: TrainingArguments) -> None:
    model = make_model(hidden_dropout=0.5).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    try_out(model, training_args)
    assert torch.equal(torch.rand(3), expected)
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_broken_weights_show_before_training(make_model: ModelFactory, training_args: TrainingArguments) -> None:
    model = make_model()
    model.model.norm.weight.data.fill_(torch.inf)
    with pytest.raises(UserError, match="the loss before training is nan"):
        try_out(model, training_args)
