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
from several_processes import launched
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
CONFIGS = SCRIPT.parent / "accelerate"
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


# The config, how many processes it starts, and further options.
LAUNCHES = {
    "ddp": ("ddp", 2, ["--per_device_train_batch_size", "1"]),
    "fsdp2": ("fsdp2", 2, ["--per_device_train_batch_size", "1"]),
    "divided rows": ("ddp", 2, ["--context_parallel_size", "2"]),
    "divided heads": ("ddp", 2, ["--tensor_parallel_size", "2", "--save_only_model", "True"]),
    "heads and weights": (
        "tensor_parallel",
        4,
        ["--tensor_parallel_size", "2", "--per_device_train_batch_size", "1", "--save_only_model", "True"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes", "options"), LAUNCHES.values(), ids=LAUNCHES.keys())
def test_several_processes_train_as_one_does(
    main: Callable[[list[str]], None], tmp_path: Path, rows: str, config: str, processes: int, options: list[str]
) -> None:
    """`accelerate launch` starts them with each config. FSDP is ignored on the CPU, and a warning says so."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    arguments = [*TINY, "--config_overrides", "hidden_size=32,num_hidden_layers=2,num_attention_heads=12,head_dim=8"]
    arguments += ["--train_file", rows, "--isolate_documents", "--max_steps", "3", "--save_steps", "3"]
    arguments += ["--logging_steps", "1", "--max_eval_samples", "6", "--per_device_eval_batch_size", "1"]
    main(["--output_dir", str(tmp_path / "one"), *arguments])
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    output = launched([*launch, str(SCRIPT), *arguments, *options, "--output_dir", str(tmp_path / "two")], **cache)
    assert ("accelerate ignores it on cpu" in output) == (config == "fsdp2")
    run = json.loads((tmp_path / "two" / "checkpoint-3" / "training_run.json").read_text())
    assert run["arguments"]["processes"] == processes
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("one", "two")]
    logs = [state["log_history"][:3] for state in states]
    for name in ("loss", "grad_norm"):
        assert [entry[name] for entry in logs[1]] == pytest.approx([entry[name] for entry in logs[0]], abs=1e-4)
    # With FSDP2 no process has all gains.
    assert ("score_bound" in logs[1][-1]) == (processes == 2)
    if processes == 2:
        assert logs[1][-1]["score_bound"] == pytest.approx(logs[0][-1]["score_bound"], abs=1e-3)
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two")]
    assert results[1]["eval_perplexity"] == pytest.approx(results[0]["eval_perplexity"], rel=1e-4)
    if processes == 2 and config == "ddp" and "--per_device_train_batch_size" not in options:
        # All ranks evaluate on the same rows. Otherwise Trainer's mean gives labels other weights.
        assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], abs=1e-4)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two")]
    with torch.no_grad():
        right, found = (model(torch.arange(60)[None]).logits for model in models)
    torch.testing.assert_close(found, right, rtol=0, atol=2e-3)
    assert not list((tmp_path / "two").glob("weights-to-divide*"))


def test_the_config_for_gpus_starts_two_processes_that_divide_rows(tmp_path: Path) -> None:
    names = ("WORLD_SIZE", "ACCELERATE_USE_FSDP", "PARALLELISM_CONFIG_CP_SIZE")
    program = tmp_path / "program.py"
    program.write_text(f"import os\nprint(*(name + '=' + os.environ[name] for name in {names}), flush=True)")
    config = CONFIGS / "fsdp2_context_parallel.yaml"
    output = launched([sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(program)])
    for setting in ("WORLD_SIZE=2", "ACCELERATE_USE_FSDP=true", "PARALLELISM_CONFIG_CP_SIZE=2"):
        assert output.count(setting) == 2


def test_rows_are_divided_among_several_processes_only(
    main: Callable[[list[str]], None], tmp_path: Path, rows: str
) -> None:
    arguments = ["--output_dir", str(tmp_path / "run"), *TINY, "--train_file", rows, "--max_steps", "1"]
    with pytest.raises(UserError, match="several processes, not for NO"):
        main([*arguments, "--context_parallel_size", "2"])
    with pytest.raises(UserError, match="context_parallel_size"):
        main([*arguments, "--context_parallel_size", "0"])


def test_heads_are_divided_among_several_processes_only(
    main: Callable[[list[str]], None], tmp_path: Path, rows: str
) -> None:
    arguments = ["--output_dir", str(tmp_path / "run"), *TINY, "--train_file", rows, "--max_steps", "1"]
    with pytest.raises(UserError, match="--tensor_parallel_size 2 does not divide the 1 processes"):
        main([*arguments, "--tensor_parallel_size", "2"])
    with pytest.raises(UserError, match="tensor_parallel_size"):
        main([*arguments, "--tensor_parallel_size", "0"])
    main(arguments)
    again = [*arguments, "--max_steps", "2", "--resume_from_checkpoint", "True", "--tensor_parallel_size", "2"]
    with pytest.raises(UserError, match=r"cannot continue .*--model_name_or_path \S+checkpoint-1"):
        main(again)


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
    "impossible training argument": (["--warmup_steps", "-1"], r"warmup_steps (>= 0|must be an integer or a float)"),
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
