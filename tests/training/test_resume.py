"""A resumed run ends with the weights of an uninterrupted one, or it is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from bomb import Bomb
from safetensors.torch import load_file
from tiny_training import TINY, write_rows
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_alibi.cli import train as train_command
from hf_alibi.errors import UserError
from hf_alibi.training.resume import find_checkpoint

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
pytestmark = pytest.mark.usefixtures("datasets_cache")
RESUME = ["--resume_from_checkpoint", "True"]
# Transformers 5.24 renamed this option.
CHECKPOINTING = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"

main = train_command.main


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Returns a file of 100 documents of different lengths, about 280 blocks."""
    return write_rows(tmp_path / "rows.jsonl", 100)


@pytest.fixture
def few_rows(tmp_path: Path) -> str:
    """Returns a file of 4 documents with 9 blocks, fewer than the 12 blocks of six steps."""
    return write_rows(tmp_path / "few.jsonl", 4, lines=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Returns a run of six steps with checkpoints at 2, 4 and 6, and its command without the folder."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_rows(folder / "rows.jsonl", 100)
    arguments = [*TINY, "--train_file", data, "--validation_split_percentage", "0"]
    arguments += ["--max_steps", "6", "--save_steps", "2"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        main(["--output_dir", str(folder / "run"), *arguments])
    return folder / "run", arguments


def interrupted(trained: tuple[Path, list[str]], folder: Path, *steps: int) -> Path:
    """Returns a folder with copies of only these checkpoints."""
    for step in steps:
        shutil.copytree(trained[0] / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


RESUMABLE = {
    "map-style": [],
    "streaming": ["--streaming"],
    "isolated, accumulating": ["--isolate_documents", "--gradient_accumulation_steps", "2"],
    "streaming, accumulating": ["--streaming", "--gradient_accumulation_steps", "2"],
    "streaming in a worker": ["--streaming", "--dataloader_num_workers", "1"],
    "workers that live on": ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "True"],
    "evaluating": ["--eval_strategy", "steps", "--eval_steps", "2", "--max_eval_samples", "4"],
    "bfloat16, checkpointed activations": ["--bf16", f"--{CHECKPOINTING}_checkpointing", "True"],
}


@pytest.mark.parametrize("options", RESUMABLE.values(), ids=RESUMABLE.keys())
@pytest.mark.parametrize("passes", ["one pass", "several passes"])
def test_resumed_run_ends_with_the_same_weights(
    rows: str, few_rows: str, tmp_path: Path, options: list[str], passes: str
) -> None:
    data = ["--train_file", rows if passes == "one pass" else few_rows, "--validation_file", rows]
    arguments = [*TINY, *options, *data, "--max_eval_samples", "4", "--max_steps", "14", "--save_steps", "11"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main(["--output_dir", str(whole), *arguments])
    shutil.copytree(whole / "checkpoint-11", resumed / "checkpoint-11")
    assert weights(whole) != weights(whole / "checkpoint-11")
    main(["--output_dir", str(resumed), *arguments, *RESUME])
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_a_stream_has_each_block_once_a_pass_and_other_orders(few_rows: str, tmp_path: Path) -> None:
    from hf_alibi.training import load_file_corpus, pack, train_tokenizer
    from hf_alibi.training.stream import EndlessStream

    corpus = load_file_corpus(few_rows, streaming=True, validation_percentage=0)
    blocks = pack(corpus, train_tokenizer(["text"], 258), 16)["train"]
    once = sorted(tuple(block["input_ids"]) for block in blocks)
    stream = iter(EndlessStream([blocks], seed=0))
    passes = [[tuple(next(stream)["input_ids"]) for _ in once] for _ in range(3)]
    assert all(sorted(order) == once for order in passes)
    assert len({tuple(order) for order in passes}) == 3


def test_a_run_at_its_last_step_makes_no_further_one(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path / "run", 6)
    main(["--output_dir", str(folder), *trained[1], *RESUME])
    assert weights(folder) == weights(trained[0])
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 6


def test_a_checkpoint_generates_with_a_cache(trained: tuple[Path, list[str]]) -> None:
    for folder in (trained[0] / "checkpoint-2", trained[0]):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model(torch.tensor([[1, 2, 3]])).past_key_values is not None


def test_no_pickle_but_the_states_is_written(trained: tuple[Path, list[str]]) -> None:
    states = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    plain = {".json", ".safetensors", ".py", ".jinja"}
    for path in trained[0].rglob("*"):
        assert path.is_dir() or path.name in states or path.suffix in plain, path


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(tmp_path: Path, rows: str) -> None:
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(SCRIPT.parents[1])}
    arguments = [*TINY, "--train_file", rows, "--max_steps", "100", "--save_steps", "10", "--save_total_limit", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = [sys.executable, str(SCRIPT), *arguments]
    subprocess.run([*run, "--output_dir", str(whole)], env=environment, check=True)
    process = subprocess.Popen([*run, "--output_dir", str(killed)], env=environment)
    while not list(killed.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists()
    subprocess.run([*run, "--output_dir", str(killed), *RESUME], env=environment, check=True)
    assert weights(killed) == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [[], ["--streaming"]], ids=["map-style", "streaming"])
def test_two_processes_resume_to_the_same_weights(tmp_path: Path, few_rows: str, streaming: list[str]) -> None:
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(SCRIPT.parents[1])}
    arguments = [*TINY, *streaming, "--train_file", few_rows, "--validation_split_percentage", "0"]
    arguments += ["--max_steps", "6", "--save_steps", "4"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    subprocess.run([*run, *arguments, "--output_dir", str(whole)], env=environment, check=True)
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    assert (whole / "checkpoint-4" / "rng_state_1.pth").exists()
    subprocess.run([*run, *arguments, "--output_dir", str(resumed), *RESUME], env=environment, check=True)
    assert weights(resumed) == weights(whole)
    with pytest.raises(UserError, match=r"processes \(1, not 2\)"):
        main(["--output_dir", str(resumed), *arguments, *RESUME])
    (resumed / "checkpoint-4" / "rng_state_1.pth").unlink()
    args = TrainingArguments(str(resumed), resume_from_checkpoint=str(resumed / "checkpoint-4"), use_cpu=True)
    with pytest.raises(UserError, match=r"no rng_state_1.pth"):
        find_checkpoint(args)


# Damaged checkpoints


def cut(name: str, keep: float) -> Callable[[Path], Any]:
    def tear(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return tear


def zero_the_middle(name: str) -> Callable[[Path], Any]:
    """Returns a function that zeroes the middle of a file, as after a power cut before all blocks were written."""

    def tear(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
        (folder / name).write_bytes(content)

    return tear


def replace_by_a_bomb(folder: Path) -> None:
    torch.save(Bomb(folder.parent / "crater"), folder / "optimizer.pt")


def cut_a_shard(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    cut(sorted(folder.glob("model-*.safetensors"))[1].name, 0.9)(folder)


def lose_a_shard(folder: Path) -> None:
    cut_a_shard(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


READ = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "config.json")
TORN: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"{name}, {part}": (cut(name, keep), name) for name in READ for part, keep in {"empty": 0, "cut": 0.7}.items()},
    "tokenizer": (cut("tokenizer.json", 0.5), "tokenizer.json"),
    "record": (cut("training_run.json", 0.5), "training_run.json"),
    "state without a step": (lambda folder: (folder / "trainer_state.json").write_text("{}"), "does not say the step"),
    "zeros in the optimizer": (zero_the_middle("optimizer.pt"), "optimizer.pt"),
    "pickle that runs code": (replace_by_a_bomb, "optimizer.pt"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "it has no model.safetensors"),
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "it has no trainer_state.json"),
    "shard that is cut": (cut_a_shard, "model-00002-of-.*safetensors"),
    "shard that is missing": (lose_a_shard, "model.safetensors.index.json"),
    "no optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "no optimizer"),
}


@pytest.mark.parametrize(("tear", "fault"), TORN.values(), ids=TORN.keys())
def test_a_torn_checkpoint_is_passed_over_and_named(
    trained: tuple[Path, list[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tear: Callable[[Path], Any],
    fault: str,
) -> None:
    folder = interrupted(trained, tmp_path / "run", 2, 4)
    tear(folder / "checkpoint-4")
    args = TrainingArguments(str(folder), resume_from_checkpoint="True", use_cpu=True)
    assert find_checkpoint(args) == str(folder / "checkpoint-2")
    assert "checkpoint-4 is passed over" in caplog.text
    assert re.search(fault, caplog.text)
    args.resume_from_checkpoint = str(folder / "checkpoint-4")
    with pytest.raises(UserError, match=f"no checkpoint to resume from: .*{fault}") as error:
        find_checkpoint(args)
    assert "\n" not in str(error.value)
    assert not (folder / "crater").exists()


def test_a_run_falls_back_to_the_last_good_checkpoint(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path / "run", 2, 4)
    cut("optimizer.pt", 0.7)(folder / "checkpoint-4")
    (folder / "checkpoint-best").mkdir()
    main(["--output_dir", str(folder), *trained[1], *RESUME])
    assert weights(folder) == weights(trained[0])


def test_only_torn_checkpoints_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = TrainingArguments(str(tmp_path), resume_from_checkpoint="True", use_cpu=True)
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert find_checkpoint(args) is None
    assert "training begins at the first step" in caplog.text


def test_the_last_checkpoint_is_that_of_the_largest_number(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path / "run", 2, 4)
    (folder / "checkpoint-4").rename(folder / "checkpoint-10")
    args = TrainingArguments(str(folder), resume_from_checkpoint="True", use_cpu=True)
    assert find_checkpoint(args) == str(folder / "checkpoint-10")


def test_output_of_another_run_is_not_overwritten(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    finished = tmp_path / "finished"
    finished.mkdir()
    assert find_checkpoint(TrainingArguments(str(finished), use_cpu=True)) is None
    (finished / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not an empty folder"):
        find_checkpoint(TrainingArguments(str(finished), use_cpu=True))
    with pytest.raises(UserError, match="a model but no checkpoint"):
        find_checkpoint(TrainingArguments(str(finished), resume_from_checkpoint="True", use_cpu=True))
    other = interrupted(trained, tmp_path / "other", 2) / "checkpoint-2"
    args = TrainingArguments(str(finished), resume_from_checkpoint=str(other), use_cpu=True)
    with pytest.raises(UserError, match="not an empty folder"):
        find_checkpoint(args)


# Checkpoints without an optimizer


def test_weights_alone_are_refused(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    main(["--output_dir", str(folder), *trained[1], "--save_only_model", "True"])
    with pytest.raises(UserError, match=r"no optimizer and no scheduler.pt and no rng_state.pth.*--fresh_optimizer"):
        main(["--output_dir", str(folder), *trained[1], *RESUME])


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_missing_state_is_refused(trained: tuple[Path, list[str]], tmp_path: Path, name: str) -> None:
    folder = interrupted(trained, tmp_path / "run", 4)
    (folder / "checkpoint-4" / name).unlink()
    with pytest.raises(UserError, match=f"no {name.removesuffix('.pt')}.*--fresh_optimizer True"):
        main(["--output_dir", str(folder), *trained[1], *RESUME])


def test_a_checkpoint_that_says_nothing_of_its_run_is_refused(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path / "run", 4)
    (folder / "checkpoint-4" / "training_run.json").unlink()
    for fresh in ([], ["--fresh_optimizer", "True"]):
        with pytest.raises(UserError, match=r"no training_run.json.*--model_name_or_path"):
            main(["--output_dir", str(folder), *trained[1], *RESUME, *fresh])


def test_a_fresh_optimizer_goes_on_at_the_learning_rate_of_the_step(
    trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = interrupted(trained, tmp_path / "run", 4)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / "checkpoint-4" / name).unlink()
    arguments = ["--output_dir", str(folder), *trained[1], *RESUME, "--fresh_optimizer", "True"]
    main([*arguments, "--logging_steps", "1"])
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    # The rate falls linearly, from 0.01 at the first step to 0 after six.
    assert rates == pytest.approx({5: 0.01 * 2 / 6, 6: 0.01 / 6})
    before, after = load_file(folder / "checkpoint-4/model.safetensors"), load_file(folder / "model.safetensors")
    largest = max((after[name] - before[name]).abs().max().item() for name in before)
    # Adam's first two steps are at most as large as the learning rate, and there is no weight decay.
    assert 0 < largest < 1.5 * sum(rates.values())


def test_a_fresh_optimizer_needs_a_checkpoint(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True)
    with pytest.raises(UserError, match="--fresh_optimizer needs --resume_from_checkpoint"):
        find_checkpoint(args, fresh_optimizer=True)


def test_a_fresh_optimizer_needs_a_rate_that_follows_from_the_step(
    trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    arguments = [*trained[1], "--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps"]
    arguments += ["--validation_file", trained[1][trained[1].index("--train_file") + 1], "--max_eval_samples", "2"]
    folder = tmp_path / "run"
    main(["--output_dir", str(folder), *arguments, "--save_only_model", "True"])
    with pytest.raises(UserError, match=r"the learning rate of .*reduce_lr_on_plateau does not follow from the step"):
        main(["--output_dir", str(folder), *arguments, *RESUME, "--fresh_optimizer", "True"])


# Runs that differ from that of the checkpoint

CHANGED = {
    "learning rate": (["--learning_rate", "0.02"], r"learning_rate \(0.02, not 0.01\)"),
    "seed": (["--seed", "1"], r"seed \(1, not 42\)"),
    "batch": (["--per_device_train_batch_size", "4"], r"per_device_train_batch_size \(4, not 2\)"),
    "length": (["--max_steps", "7"], r"max_steps \(7, not 6\)"),
    "block size": (["--block_size", "17"], r"block_size \(17, not 16\)"),
    "vocabulary": (["--vocab_size", "301"], r"vocab_size \(301, not 300\)"),
    "config": (["--config_overrides", ""], "config_overrides"),
    "dtype": (["--dtype", "bfloat16"], r'dtype \("bfloat16", not "float32"\)'),
    "backend": (["--attn_implementation", "eager"], r'attn_implementation \("eager", not null\)'),
    "fewer blocks": (["--max_train_samples", "9"], r"max_train_samples \(9, not null\)"),
    "divided rows": (["--context_parallel_size", "2"], r"context_parallel_size \(2, not null\)"),
    "two": (["--weight_decay", "0.1", "--seed", "1"], r"seed \(1, not 42\), weight_decay \(0.1, not 0.0\)"),
    "other data": (["--train_file", "{other}"], "differs in its training data"),
    "streaming": (["--streaming"], r"streaming \(true, not false\)"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED.keys())
def test_another_run_is_refused_by_name(
    trained: tuple[Path, list[str]], tmp_path: Path, change: list[str], message: str
) -> None:
    folder = interrupted(trained, tmp_path / "run", 4)
    other = tmp_path / "other.jsonl"
    original = Path(trained[1][trained[1].index("--train_file") + 1]).read_text()
    other.write_text(original.replace("line 0 of document 99\\n", "line 0 of document 98\\n"))
    assert other.read_text() != original
    change = [value.format(other=other) for value in change]
    with pytest.raises(UserError, match=message) as error:
        main(["--output_dir", str(folder), *trained[1], *change, *RESUME])
    assert "belongs to another run" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_does_not_decide_the_weights_may_change(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder = interrupted(trained, tmp_path / "run", 4)
    data = trained[1][trained[1].index("--train_file") + 1]
    moved = shutil.copyfile(data, tmp_path / "moved.jsonl")
    change = ["--train_file", str(moved), "--validation_file", data, "--max_eval_samples", "4", "--eval_strategy"]
    change += ["steps", "--eval_steps", "1", "--save_steps", "1", "--save_total_limit", "1", "--logging_steps", "1"]
    main(["--output_dir", str(folder), *trained[1], *change, *RESUME])
    assert weights(folder) == weights(trained[0])
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [5, 6]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [5, 6]


def test_a_constant_learning_rate_lets_a_run_become_longer(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    constant = [*trained[1], "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "2"]
    long, short = tmp_path / "long", tmp_path / "short"
    main(["--output_dir", str(long), *constant])
    main(["--output_dir", str(short), *constant, "--max_steps", "4"])
    with pytest.raises(UserError, match="at step 4, beyond the 3 of this run"):
        main(["--output_dir", str(short), *constant, "--max_steps", "3", *RESUME])
    main(["--output_dir", str(short), *constant, *RESUME])
    assert weights(short) == weights(long)


def test_another_stream_is_refused(rows: str, tmp_path: Path) -> None:
    arguments = [*TINY, "--streaming", "--validation_split_percentage", "0", "--max_steps", "6", "--save_steps", "4"]
    folder = tmp_path / "run"
    main(["--output_dir", str(folder), *arguments, "--train_file", rows])
    shutil.rmtree(folder / "checkpoint-6")
    changed = Path(rows).read_text().replace("line 0", "line 9")
    Path(rows).write_text(changed)
    with pytest.raises(UserError, match="differs in the first 8 blocks of its data"):
        main(["--output_dir", str(folder), *arguments, "--train_file", rows, *RESUME])


def test_another_model_is_refused(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    from hf_alibi.training.run_record import read_record, refuse_changes, write_record

    checkpoint = interrupted(trained, tmp_path / "run", 4) / "checkpoint-4"
    model = read_record(checkpoint)["model"]
    refuse_changes(checkpoint, model=model)
    # Trainer takes tokens from the tokenizer when it begins, so a checkpoint's config has them, and the first may not.
    write_record(checkpoint, read_record(checkpoint) | {"model": model | {"pad_token_id": None}})
    refuse_changes(checkpoint, model=model | {"pad_token_id": 1, "bos_token_id": 0})
    with pytest.raises(UserError, match=r"hidden_dropout \(0.2, not 0.1\), rope \(1, not null\)"):
        refuse_changes(checkpoint, model=model | {"hidden_dropout": 0.2, "rope": 1})


def test_other_versions_are_warned_of(
    trained: tuple[Path, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = interrupted(trained, tmp_path / "run", 4)
    path = folder / "checkpoint-4" / "training_run.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"versions": {"torch": "1.0", "transformers": "4.0"}}))
    main(["--output_dir", str(folder), *trained[1], *RESUME])
    assert "was written with torch 1.0" in caplog.text
    assert "was written with transformers 4.0" in caplog.text
