"""Training with `scripts/train.py`: the files that it writes, how it resumes, and what it refuses before it writes."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ModelFactory
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from tiny_training import TINY, write_rows
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
)

from hf_alibi import AlibiGPTConfig, AlibiGPTForCausalLM
from hf_alibi.cli import train as train_command
from hf_alibi.errors import UserError
from hf_alibi.training.data import train_tokenizer
from hf_alibi.training.packing import pack
from hf_alibi.training.trainer import check_vocabulary, train

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Returns a file of 100 documents of different lengths."""
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def checkpoint(tmp_path: Path, make_model: ModelFactory) -> Path:
    """Returns a small AlibiGPT with a tokenizer of 300 tokens."""
    folder = tmp_path / "checkpoint"
    make_model(vocab_size=300).save_pretrained(folder)
    train_tokenizer([Path(__file__).read_text()], 300).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def main() -> Callable[[list[str]], None]:
    return train_command.main


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments]


def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(SCRIPT.parents[1])}


def test_script_trains_on_the_standard_library(tmp_path: Path) -> None:
    output = tmp_path / "run"
    limits = ["--max_steps", "4", "--max_eval_samples", "8", "--eval_strategy", "steps", "--eval_steps", "2"]
    finished = subprocess.run(
        command("--output_dir", str(output), *TINY, *limits, "--report_to", "tensorboard"),
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads((output / "all_results.json").read_text())
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]), rel=1e-3)
    assert re.search(rf"eval_perplexity += +{round(results['eval_perplexity'], 4)}\n", finished.stdout)
    assert results["train_loss"] == json.loads((output / "train_results.json").read_text())["train_loss"]
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_perplexity" in entry] == [2, 4]
    assert list((output / "runs").rglob("events.out.tfevents.*"))

    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert isinstance(model, AlibiGPTForCausalLM)
    assert (model.config.training_length, model.config.use_cache) == (16, True)
    assert model.config.vocab_size == len(tokenizer) == 300


@pytest.mark.slow
def test_two_processes(tmp_path: Path, rows: str) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(SCRIPT)]
    arguments = ["--output_dir", str(tmp_path / "run"), *TINY, "--train_file", rows, "--max_steps", "3"]
    subprocess.run([*launch, *arguments], env=environment(tmp_path), check=True)
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]), rel=0.02)


def test_fine_tuning_starts_from_the_checkpoint(
    main: Callable[[list[str]], None], checkpoint: Path, rows: str, tmp_path: Path
) -> None:
    start = ["--model_name_or_path", str(checkpoint), "--train_file", rows, "--block_size", "16"]
    main(["--output_dir", str(tmp_path / "run"), *start, "--max_steps", "1", "--learning_rate", "0"])
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_perplexity_of_isolated_documents_is_that_of_each_document_alone(
    tmp_path: Path, make_model: ModelFactory
) -> None:
    texts = [f"document number {n} " * (n % 5 + 1) for n in range(20)]
    tokenizer = train_tokenizer(texts, 270)
    documents = Dataset.from_dict({"text": texts})
    blocks = pack(DatasetDict(train=documents, validation=documents), tokenizer, 10_000, isolate_documents=True)
    model = make_model(vocab_size=len(tokenizer))
    args = TrainingArguments(str(tmp_path / "run"), max_steps=1, learning_rate=0.0, use_cpu=True, disable_tqdm=True)
    metrics = train(model, tokenizer, blocks, args)

    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_vocabulary_must_fit() -> None:
    tokenizer = train_tokenizer(["a"], 258)
    check_vocabulary(tokenizer, AlibiGPTConfig(vocab_size=258))
    with pytest.raises(UserError, match="258 tokens, more than the 257"):
        check_vocabulary(tokenizer, AlibiGPTConfig(vocab_size=257))


BAD_ARGUMENTS = {
    "missing file": (["--train_file", "missing.txt"], "no such file: missing.txt"),
    "empty corpus": (["--train_file", "{empty}"], "is empty"),
    "tokenizer larger than the model": (
        ["--tokenizer_name", "{checkpoint}", "--config_overrides", "vocab_size=299", "--train_file", "{rows}"],
        "300 tokens, more than the 299",
    ),
    "tokenizer larger than the checkpoint": (
        ["--model_name_or_path", "{checkpoint}", "--tokenizer_name", "{large}", "--train_file", "{rows}"],
        "310 tokens, more than the 300",
    ),
    "no tokenizer": (["--tokenizer_name", "{empty}", "--train_file", "{rows}"], "cannot load a tokenizer"),
    "another architecture": (
        ["--model_name_or_path", "{gpt2}", "--train_file", "{rows}"],
        "'gpt2' checkpoint; expected alibi_gpt",
    ),
    "truncated weights": (
        ["--model_name_or_path", "{truncated}", "--train_file", "{rows}"],
        "cannot load the weights",
    ),
    "another shape": (
        ["--model_name_or_path", "{checkpoint}", "--config_overrides", "hidden_size=64", "--train_file", "{rows}"],
        "hidden_size is 96 in .* and cannot be changed",
    ),
    "unknown architecture": (["--model_type", "alibi", "--train_file", "{rows}"], "alibi"),
    "unknown field": (["--config_overrides", "width=64", "--train_file", "{rows}"], "has no field 'width'"),
    "field of another type": (["--config_overrides", "hidden_size=x", "--train_file", "{rows}"], "hidden_size"),
    "heads that do not divide": (
        ["--config_overrides", "hidden_size=64,num_attention_heads=7", "--train_file", "{rows}"],
        "64 does not divide into 7 heads",
    ),
    "unknown argument": (["--trainfile", "x.txt"], "--trainfile"),
    "two sources": (["--train_file", "x.txt", "--dataset_name", "y"], "not both"),
    "validation alone": (["--validation_file", "x.txt"], "needs --train_file"),
    "streaming the default": (["--streaming"], "needs --dataset_name or --train_file"),
    "endless streaming": (["--train_file", "{rows}", "--streaming"], "needs --max_steps"),
    "impossible training argument": (["--warmup_steps", "-1"], "warmup_steps >= 0"),
    "unknown attention": (["--attn_implementation", "slow", "--train_file", "{rows}", *TINY], "slow"),
    "unknown reporter": (["--report_to", "paper", "--train_file", "{rows}", *TINY], "paper is not supported"),
    "block too short": (["--train_file", "{rows}", *TINY, "--block_size", "1"], "at least 3"),
}


@pytest.fixture
def inputs(tmp_path: Path, checkpoint: Path, rows: str) -> dict[str, str]:
    """Returns the files and folders that the bad arguments name."""
    folders = {name: tmp_path / name for name in ("empty", "gpt2", "large", "truncated")}
    folders["empty"] = tmp_path / "empty.txt"
    folders["empty"].touch()
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folders["gpt2"])
    train_tokenizer([Path(__file__).read_text()], 310).save_pretrained(folders["large"])
    shutil.copytree(checkpoint, folders["truncated"])
    weights = folders["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {name: str(path) for name, path in folders.items()} | {"checkpoint": str(checkpoint), "rows": rows}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments(
    main: Callable[[list[str]], None], inputs: dict[str, str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    output = tmp_path / "run"
    arguments = [argument.format(**inputs) for argument in arguments]
    with pytest.raises(UserError, match=message) as refusal:
        main(["--output_dir", str(output), "--use_cpu", *arguments])
    assert len(str(refusal.value)) < 500
    assert not output.exists()


def test_error_of_the_script_is_one_line(tmp_path: Path) -> None:
    arguments = ["--output_dir", str(tmp_path / "run"), "--train_file", str(tmp_path / "missing.txt")]
    finished = subprocess.run(command(*arguments), env=environment(tmp_path), capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stderr == f"error: no such file: {tmp_path / 'missing.txt'}\n"
    assert not (tmp_path / "run").exists()
