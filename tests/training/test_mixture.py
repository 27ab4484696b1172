"""Mixtures of data sets: in the proportions of the weights, no block twice or left out, and exact after a kill."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny import tiny_tokenizer
from tiny_training import TINY, write_rows

from hf_alibi.__main__ import main
from hf_alibi.errors import UserError
from hf_alibi.training.data import load_file_corpus
from hf_alibi.training.mixture import Mixture
from hf_alibi.training.packing import pack
from hf_alibi.training.run_record import data_digest
from hf_alibi.training.stream import EndlessStream

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("datasets_cache")


def numbered(name: int, count: int) -> Dataset:
    """Returns `count` blocks that say to which data set they belong and which they are."""
    return Dataset.from_dict({"input_ids": [[name, number, 0] for number in range(count)]})


def streamed(name: int, count: int) -> IterableDataset:
    return numbered(name, count).to_iterable_dataset()


# Map-style


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1, 1], [3.0, 0.5], [0.1, 0.9]])
@pytest.mark.parametrize("sizes", [[40, 90], [33, 33], [100, 20]])
def test_blocks_of_each_data_set_come_once_a_pass(weights: list[float], sizes: list[int]) -> None:
    mixture = Mixture([numbered(name, size) for name, size in enumerate(sizes)], weights, seed=0)
    read: list[list[int]] = [[], []]
    for epoch in range(7):
        mixture.set_epoch(epoch)
        for name, number, _ in (block["input_ids"] for block in mixture):
            read[name].append(number)
        counts = [len(numbers) for numbers in read]
        assert counts == [count * (epoch + 1) for count in mixture.counts]
    # As near to the weights as whole blocks allow, and one data set is read once in each epoch.
    assert mixture.counts[0] / weights[0] == pytest.approx(mixture.counts[1] / weights[1], abs=1 / min(weights))
    assert any(count == size for count, size in zip(mixture.counts, sizes, strict=True))
    for numbers, size in zip(read, sizes, strict=True):
        passes = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        assert all(sorted(once) == list(range(size)) for once in passes if len(once) == size)
        assert len(set(passes[-1])) == len(passes[-1])
        assert len({tuple(once) for once in passes}) == len(passes)


def test_an_epoch_is_the_same_in_any_order_and_process() -> None:
    mixture = Mixture([numbered(0, 30), numbered(1, 50)], [0.5, 0.5], seed=3)
    mixture.set_epoch(2)
    blocks = [block["input_ids"] for block in mixture]
    assert [mixture[index]["input_ids"] for index in reversed(range(len(mixture)))] == blocks[::-1]
    mixture.set_epoch(0)
    mixture[0]
    mixture.set_epoch(2)
    assert [block["input_ids"] for block in mixture] == blocks
    assert [block["input_ids"] for block in pickle.loads(pickle.dumps(mixture))] == blocks
    with pytest.raises(IndexError):
        mixture[len(mixture)]
    other = Mixture(mixture.parts, [0.5, 0.5], seed=4)
    other.set_epoch(2)
    assert [block["input_ids"] for block in other] != blocks


def first_numbers(batch: list[dict[str, list[int]]]) -> list[list[int]]:
    return [block["input_ids"] for block in batch]


def test_workers_that_live_on_read_the_next_epoch() -> None:
    mixture = Mixture([numbered(0, 12), numbered(1, 40)], [0.5, 0.5], seed=0)
    loader = torch.utils.data.DataLoader(mixture, num_workers=1, persistent_workers=True, collate_fn=first_numbers)
    for epoch in range(3):
        mixture.set_epoch(epoch)
        assert [blocks[0] for blocks in loader] == [block["input_ids"] for block in mixture]


def test_the_digest_tells_mixtures_apart() -> None:
    parts = [numbered(0, 30), numbered(1, 50)]
    digest = data_digest(Mixture(parts, [0.5, 0.5], seed=0))
    assert digest == data_digest(Mixture(parts, [0.5, 0.5], seed=0))
    assert digest != data_digest(Mixture(parts, [0.4, 0.6], seed=0))
    assert digest != data_digest(Mixture([numbered(0, 30), numbered(1, 51)], [0.5, 0.5], seed=0))


def test_a_weight_too_small_for_a_block() -> None:
    with pytest.raises(UserError, match="give no block of one data set in an epoch"):
        Mixture([numbered(0, 5), numbered(1, 5)], [0.999, 0.001], seed=0)


# Streams


def test_streams_are_mixed_by_weight_and_read_in_passes() -> None:
    stream = EndlessStream([streamed(0, 50), streamed(1, 70)], seed=0, weights=[7, 3])
    blocks = [tuple(block["input_ids"]) for block in islice(stream, 2000)]
    counts = Counter(name for name, *_ in blocks)
    # Four standard deviations of 2,000 draws.
    assert abs(counts[0] / 2000 - 0.7) < 0.041
    for name, size in [(0, 50), (1, 70)]:
        numbers = [number for of, number, _ in blocks if of == name]
        passes = [numbers[start : start + size] for start in range(0, len(numbers) - size, size)]
        assert len(passes) > 5
        assert all(sorted(once) == list(range(size)) for once in passes)
        assert len({tuple(once) for once in passes}) == len(passes)
    assert [tuple(block["input_ids"]) for block in islice(stream, 2000)] == blocks
    other = EndlessStream(stream.parts, seed=1, weights=[7, 3])
    assert [tuple(block["input_ids"]) for block in islice(other, 2000)] != blocks


def test_a_worker_without_a_part_of_one_stream_reads_the_others() -> None:
    nothing = streamed(0, 10).take(0)
    stream = EndlessStream([nothing, streamed(1, 10)], seed=0, weights=[0.9, 0.1])
    assert {block["input_ids"][0] for block in islice(stream, 100)} == {1}
    assert list(EndlessStream([nothing, nothing], seed=0, weights=[0.9, 0.1])) == []


# The command


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Returns two files with about 10 and 45 blocks of 16 tokens."""
    return [write_rows(tmp_path / "few.jsonl", 4, lines=3), write_rows(tmp_path / "more.jsonl", 20, lines=5)]


def prepare_sources(sources: list[str], folder: Path) -> list[str]:
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    folders = [str(folder / Path(source).stem) for source in sources]
    for source, data in zip(sources, folders, strict=True):
        options = ["--tokenizer_name", str(folder / "tokenizer"), "--validation_split_percentage", "0"]
        main(["prepare", "--train_file", source, "--output_dir", data, *options])
    return folders


FORMS = ["map-style", "streaming", "prepared", "prepared, with workers"]


def data_options(form: str, sources: list[str], folder: Path) -> list[str]:
    weights = ["--train_weights", "0.4", "0.6"]
    if form.startswith("prepared"):
        if form.endswith("workers"):
            weights += ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "True"]
        return ["--prepared_data", *prepare_sources(sources, folder), *weights]
    streaming = ["--streaming"] if form == "streaming" else []
    return ["--train_file", *sources, *weights, "--validation_split_percentage", "0", *streaming]


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_mixture_ends_with_the_same_weights(sources: list[str], tmp_path: Path, form: str) -> None:
    # The checkpoint is in the second pass over the smaller data set, and the end in a later one.
    arguments = ["train", *TINY, *data_options(form, sources, tmp_path), "--max_steps", "28", "--save_steps", "17"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    main([*arguments, "--output_dir", str(whole)])
    shutil.copytree(whole / "checkpoint-17", resumed / "checkpoint-17")
    main([*arguments, "--output_dir", str(resumed), "--resume_from_checkpoint", "True"])
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    changed = [*arguments, "--train_weights", "0.5", "0.5", "--output_dir", str(resumed)]
    with pytest.raises(UserError, match=r"train_weights \(\[0.5, 0.5\], not \[0.4, 0.6\]\)"):
        main([*changed, "--resume_from_checkpoint", "True"])


def test_prepared_data_train_as_texts_do(sources: list[str], tmp_path: Path) -> None:
    (folder, _) = prepare_sources(sources, tmp_path)
    same = ["train", *TINY, "--tokenizer_name", str(tmp_path / "tokenizer"), "--max_steps", "7", "--isolate_documents"]
    texts = ["--train_file", sources[0], "--validation_split_percentage", "0", "--preprocessing_num_workers", "2"]
    main([*same, *texts, "--output_dir", str(tmp_path / "texts")])
    main([*same, "--prepared_data", folder, "--output_dir", str(tmp_path / "prepared")])
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("texts", "prepared")]
    assert weights[0] == weights[1]


def test_the_number_of_workers_does_not_change_the_blocks(tmp_path: Path) -> None:
    corpus = load_file_corpus(write_rows(tmp_path / "rows.jsonl", 2500, lines=3), validation_percentage=0)
    alone, together = (pack(corpus, tiny_tokenizer(), 32, num_workers=workers)["train"] for workers in (None, 2))
    assert list(together) == list(alone)


BAD_OPTIONS = {
    "one weight": (["--train_file", "{few}", "--train_weights", "1"], "has 1 numbers for 1 data sets"),
    "too many weights": (["--train_file", "{few}", "{more}", "--train_weights", "1", "1", "1"], "3 numbers for 2"),
    "no share": (["--train_file", "{few}", "{more}", "--train_weights", "1", "0"], "must be larger than 0"),
    "weights of nothing": (["--train_weights", "1", "1"], "2 numbers for 0 data sets"),
    "datasets without weights": (["--dataset_name", "a", "b"], "several --dataset_name need --train_weights"),
    "configurations": (
        ["--dataset_name", "a", "b", "--dataset_config_name", "c", "--train_weights", "1", "1"],
        "--dataset_config_name needs one name for each",
    ),
    "folders without weights": (["--prepared_data", "a", "b"], "several --prepared_data need --train_weights"),
    "texts and tokens": (["--prepared_data", "a", "--train_file", "{few}"], "leave out --train_file"),
    "streamed tokens": (["--prepared_data", "a", "--streaming"], "leave out --streaming"),
    "no folder": (["--prepared_data", "missing", "--tokenizer_name", "{few}"], "cannot load a tokenizer"),
    "workers of a stream": (
        ["--train_file", "{few}", "--streaming", "--preprocessing_num_workers", "2"],
        "no effect with --streaming.*--dataloader_num_workers",
    ),
    "workers without a file": (
        [
            "--train_file",
            "{few}",
            "{more}",
            "--train_weights",
            "1",
            "1",
            "--validation_split_percentage",
            "0",
            "--streaming",
            "--dataloader_num_workers",
            "2",
        ],
        r"--dataloader_num_workers 2 is too many for a mixture of streams with \[1, 1\] files.*give at most 1",
    ),
    "limit": (
        ["--train_file", "{few}", "{more}", "--train_weights", "1", "1", "--max_train_samples", "3"],
        "--max_train_samples limits one data set",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options(sources: list[str], tmp_path: Path, options: list[str], message: str) -> None:
    options = [option.format(few=sources[0], more=sources[1]) for option in options]
    with pytest.raises(UserError, match=message):
        main(["train", *TINY, "--max_steps", "3", *options, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# Kills, in one and in two processes

PROGRAM = """
import json, os, sys
from pathlib import Path
import torch.distributed
from hf_alibi.__main__ import main
from hf_alibi.training.safe_trainer import SafeTrainer

train_step = SafeTrainer.training_step

def recorded(self, model, inputs, *args, **kwargs):
    step, rank = self.state.global_step, self.args.process_index
    if step == int(os.environ.get("KILL_AT", -1)):
        os.kill(os.getpid(), 9)
    with open(f"{os.environ['ORDER']}-{rank}.jsonl", "a") as file:
        entry = {"processes": self.args.world_size, "step": step, "blocks": inputs["input_ids"].tolist()}
        file.write(json.dumps(entry) + "\\n")
    return train_step(self, model, inputs, *args, **kwargs)

SafeTrainer.training_step = recorded
main(sys.argv[1:])
# Every process waits for the last file of the first one, and closes its connections.
assert Path(os.environ["ORDER"], "train_results.json").exists()
assert not torch.distributed.is_initialized()
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["map-style", "streaming", "prepared"])
@pytest.mark.parametrize("processes", [1, 2])
def test_blocks_after_a_kill_are_those_of_an_uninterrupted_run(
    sources: list[str], tmp_path: Path, form: str, processes: int
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    arguments = ["train", *TINY, *data_options(form, sources, tmp_path), "--max_steps", "20", "--save_steps", "4"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def run(folder: str, *options: str, kill_at: int = -1) -> int:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        order = {"ORDER": str(tmp_path / folder), "KILL_AT": str(kill_at)}
        command = [*launch, str(program), *arguments, "--output_dir", str(tmp_path / folder), *options]
        return subprocess.run(command, env=environment | order).returncode

    def blocks(folder: str, since: int) -> list[list[dict[str, object]]]:
        files = [tmp_path / f"{folder}-{rank}.jsonl" for rank in range(processes)]
        entries = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        assert all(entry["processes"] == processes for of_rank in entries for entry in of_rank)
        return [[entry for entry in of_rank if entry["step"] >= since] for of_rank in entries]

    assert run("whole") == 0
    # By then the smaller data set is in its second pass at least.
    assert run("killed", kill_at=15) != 0
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    for file in tmp_path.glob("killed-*.jsonl"):
        file.unlink()
    assert run("killed", "--resume_from_checkpoint", "True") == 0
    assert [len(of_rank) for of_rank in blocks("killed", 0)] == [8] * processes
    assert blocks("killed", 0) == blocks("whole", 12)
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "killed")]
    assert weights[0] == weights[1]
    if processes == 2:
        assert blocks("whole", 0)[0] != blocks("whole", 0)[1]
