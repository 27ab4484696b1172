"""`hf_alibi prepare`: the same tokens as tokenising everything, however it is cut, interrupted and read."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from large_texts import peak_megabytes, write_document, write_jsonl
from tiny import tiny_tokenizer
from tiny_training import write_rows
from transformers import AutoTokenizer

from hf_alibi.__main__ import main
from hf_alibi.errors import UserError
from hf_alibi.text.encoding import Encoder
from hf_alibi.training import token_store
from hf_alibi.training.data import standard_library_corpus, train_tokenizer
from hf_alibi.training.packing import pack
from hf_alibi.training.prepare import load_prepared, prepare, tokenizer_digest
from hf_alibi.training.token_store import TokenBlocks, TokenStore

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes files, pieces and batches so small that tests have many of each."""
    monkeypatch.setattr(token_store, "TOKENS_PER_FILE", 200)
    monkeypatch.setattr("hf_alibi.text.encoding.BATCH_SIZE", 300)
    monkeypatch.setattr(Encoder.pieces, "__defaults__", (20,))


@pytest.fixture
def texts() -> list[str]:
    """Returns documents, of which one fills several files and some are empty lines."""
    short = ["".join(f"line {line} of document {n}\n" for line in range(n % 7 + 1)) for n in range(40)]
    return [*short, " ".join(f"word {n} of a long document" for n in range(300)), "\n", *short[::-1]]


def one_by_one(texts: list[str]) -> list[int]:
    tokenizer = tiny_tokenizer()
    encoded = (tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts)
    return list(chain(*([*ids, tokenizer.eos_token_id] for ids in encoded)))


def prepared(folder: Path, texts: list[str], num_workers: int | None = None) -> Path:
    prepare({"train": Dataset.from_dict({"text": texts})}, tiny_tokenizer(), folder, {"arguments": {}}, num_workers)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("isolate_documents", [False, True], ids=["crossing", "isolated"])
@pytest.mark.parametrize("block_size", [3, 7, 64, 1000, 1_000_000])
def test_blocks_of_any_size_are_those_of_packing(
    tmp_path: Path, texts: list[str], block_size: int, isolate_documents: bool
) -> None:
    folder = prepared(tmp_path / "data", texts)
    assert len(list((folder / "train").iterdir())) > 8
    blocks = load_prepared(folder, tiny_tokenizer(), block_size, isolate_documents)["train"]
    expected = pack(Dataset.from_dict({"text": texts}), tiny_tokenizer(), block_size, isolate_documents)
    assert [{name: ids.tolist() for name, ids in block.items()} for block in blocks] == list(expected)
    assert len(blocks) == len(expected)
    assert list(chain(*(block["input_ids"] for block in blocks))) == one_by_one(texts)


def test_every_length_of_the_last_block(tmp_path: Path, texts: list[str]) -> None:
    store = TokenStore(prepared(tmp_path / "data", texts[:9]) / "train")
    for block_size in range(3, len(store) + 2):
        blocks = TokenBlocks(store, block_size, isolate_documents=True)
        lengths = [len(block["input_ids"]) for block in blocks]
        assert min(lengths) >= 2
        assert max(lengths) <= block_size
        assert sum(lengths) == len(store)
        assert [len(block["position_ids"]) for block in blocks] == lengths


def test_indices_and_limits(tmp_path: Path, texts: list[str]) -> None:
    blocks = load_prepared(prepared(tmp_path / "data", texts), tiny_tokenizer(), 50)["train"]
    assert np.array_equal(blocks[-1]["input_ids"], blocks[len(blocks) - 1]["input_ids"])
    with pytest.raises(IndexError):
        blocks[len(blocks)]
    assert len(blocks.take(3)) == len(list(blocks.take(3))) == 3
    assert len(blocks.take(10**9)) == len(blocks)
    copy = pickle.loads(pickle.dumps(blocks))
    assert np.array_equal(copy[5]["input_ids"], blocks[5]["input_ids"])
    assert copy.digest() == blocks.digest() != blocks.take(3).digest()


def test_large_vocabularies_have_larger_numbers(tmp_path: Path) -> None:
    writer = token_store.StoreWriter(tmp_path, vocab_size=100_000)
    writer.add(b"text", np.array([70_000, 3], dtype=np.int32), 99_999)
    writer.write()
    assert TokenStore(tmp_path).read(0, 3).tolist() == [70_000, 3, 99_999]


def test_workers_write_the_same_files(tmp_path: Path, texts: list[str]) -> None:
    alone, together = prepared(tmp_path / "alone", texts), prepared(tmp_path / "together", texts, num_workers=2)
    assert contents(together) == contents(alone)


@pytest.mark.parametrize("files", [0, 1, 4])
def test_what_was_interrupted_continues(tmp_path: Path, texts: list[str], files: int) -> None:
    whole = prepared(tmp_path / "whole", texts)
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    record = json.loads((resumed / "prepared.json").read_text())
    (resumed / "prepared.json").write_text(json.dumps(record | {"complete": False}))
    for path in sorted((resumed / "train").iterdir())[files:]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in (resumed / "train").iterdir()}
    (resumed / "train" / f"tokens-{files:05d}.unfinished").write_bytes(b"half")
    with pytest.raises(UserError, match="is not complete: repeat the command"):
        load_prepared(resumed, tiny_tokenizer(), 16)
    assert contents(prepared(resumed, texts)) == contents(whole)
    assert all(path.stat().st_mtime_ns == kept[path] for path in kept)


def test_other_texts_do_not_continue(tmp_path: Path, texts: list[str]) -> None:
    folder = prepared(tmp_path / "data", texts)
    (folder / "train" / "tokens-00008.safetensors").unlink()
    for path in sorted((folder / "train").iterdir())[8:]:
        path.unlink()
    changed = [text.replace("line 0 of document 3", "line 0 of document 4") for text in texts]
    with pytest.raises(UserError, match=r"the texts have changed since .*tokens-00000.safetensors"):
        prepared(folder, changed)


def test_a_kill_and_the_same_command_again(tmp_path: Path) -> None:
    """Kills the command with its workers while it writes. The folder becomes that of an uninterrupted run."""
    rows = write_rows(tmp_path / "rows.jsonl", 30_000)
    arguments = ["prepare", "--train_file", rows, "--vocab_size", "300"]
    program = (
        "import sys, time\nfrom hf_alibi.training import token_store\nfrom hf_alibi.__main__ import main\n"
        "token_store.TOKENS_PER_FILE = 20_000\nmain(sys.argv[1:])"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def start(folder: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", program, *arguments, "--output_dir", str(tmp_path / folder), *options]
        return subprocess.Popen(command, env=environment, start_new_session=True)

    assert start("whole").wait() == 0
    killed = start("killed", "--preprocessing_num_workers", "2")
    while not (tmp_path / "killed" / "train" / "tokens-00002.safetensors").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not json.loads((tmp_path / "killed" / "prepared.json").read_text())["complete"]
    # Its workers end too: nobody is left in their session.
    for _ in range(200):
        try:
            os.killpg(killed.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("workers outlive the command")
    assert start("killed", "--preprocessing_num_workers", "2").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


# What is refused


def test_a_folder_of_another_tokenizer_is_refused_by_name(tmp_path: Path, texts: list[str]) -> None:
    folder = prepared(tmp_path / "data", texts)
    other = train_tokenizer(texts, 270)
    with pytest.raises(UserError, match=rf"{folder} was tokenised with another tokenizer .*--tokenizer_name {folder}"):
        load_prepared(folder, other, 16)
    with pytest.raises(UserError, match="was begun with another tokenizer"):
        prepare({"train": Dataset.from_dict({"text": texts})}, other, folder, {"arguments": {}})


def test_the_digest_of_a_tokenizer_survives_saving(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["text"], 270)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_digest(tokenizer)
    # Padding is no part of the tokens of a document.
    tokenizer.backend_tokenizer.enable_padding(length=8)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_digest(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) != tokenizer_digest(tokenizer)


def test_missing_and_damaged_files_are_refused(tmp_path: Path, texts: list[str]) -> None:
    folder = prepared(tmp_path / "data", texts)
    files = sorted((folder / "train").iterdir())
    last = files[-1].read_bytes()
    files[-1].unlink()
    with pytest.raises(UserError, match=r"of its .* tokens: files are missing"):
        load_prepared(folder, tiny_tokenizer(), 16)
    files[-1].write_bytes(last[:-10])
    with pytest.raises(UserError, match=f"{files[-1].name} cannot be read"):
        load_prepared(folder, tiny_tokenizer(), 16)
    files[-1].write_bytes(last)
    files[2].unlink()
    with pytest.raises(UserError, match="lacks some of its files"):
        load_prepared(folder, tiny_tokenizer(), 16)
    (folder / "prepared.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="has format 2, but only 1 is known"):
        load_prepared(folder, tiny_tokenizer(), 16)
    with pytest.raises(UserError, match=r"prepared.json cannot be read: .*hf_alibi prepare writes it"):
        load_prepared(tmp_path, tiny_tokenizer(), 16)


BAD_COMMANDS: dict[str, tuple[list[str], str]] = {
    "another folder": (["--output_dir", "{other}"], "is not an empty folder"),
    "another column": (["--output_dir", "x", "--text_column", "words"], "has no column 'words'"),
    "another share": (["--output_dir", "{begun}", "--validation_split_percentage", "7"], "with another arguments"),
    "weights": (["--output_dir", "x", "--train_weights", "1"], "--train_weights has 1 numbers for 1 data sets"),
    "no workers": (["--output_dir", "x", "--preprocessing_num_workers", "0"], "must be at least 1, got 0"),
    "no room for the bytes": (["--output_dir", "x", "--vocab_size", "100"], "at least 258 entries"),
}


@pytest.mark.parametrize(("options", "message"), BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_bad_commands(tmp_path: Path, options: list[str], message: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 30)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    if "{begun}" in options:
        main(["prepare", "--train_file", rows, "--vocab_size", "300", "--output_dir", str(tmp_path / "begun")])
    places: dict[str, Any] = {"other": tmp_path / "other", "begun": tmp_path / "begun"}
    with pytest.raises(UserError, match=message):
        main(
            ["prepare", "--train_file", rows, "--vocab_size", "300", *(option.format(**places) for option in options)]
        )
    assert not Path("x").exists()


# Large texts


@pytest.mark.slow
def test_a_document_of_200_megabytes(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_document(tmp_path / "book.txt", 200_000_000)
    source = ["--train_file", "book.txt", "--tokenizer_name", "tokenizer", "--validation_split_percentage", "0"]
    assert peak_megabytes(tmp_path, "prepare", *source, "--output_dir", "data") < 2000


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Two workers; the last fifth of the files is then lost. Set PREPARE_GIGABYTES=5 for a larger corpus."""
    gigabytes = float(os.environ.get("PREPARE_GIGABYTES", "0.3"))
    texts = standard_library_corpus()["train"]["text"]
    train_tokenizer(texts, 8192, max_characters=5_000_000).save_pretrained(tmp_path / "tokenizer")
    commands, peaks = {}, {}
    for name, size in [("small", 60_000_000), ("large", int(gigabytes * 1e9))]:
        write_jsonl(tmp_path / f"{name}.jsonl", size)
        print(name, (tmp_path / f"{name}.jsonl").stat().st_size, "bytes", flush=True)
        source = ["--train_file", f"{name}.jsonl", "--tokenizer_name", "tokenizer"]
        commands[name] = ["prepare", *source, "--preprocessing_num_workers", "2", "--output_dir", name]
        peaks[name] = peak_megabytes(tmp_path, *commands[name])
    # Megabytes. The larger corpus fills the memory of words, which has a limit.
    assert peaks["large"] - peaks["small"] < 300
    files = sorted((tmp_path / "large" / "train").iterdir())
    assert len(files) > 2
    lost = {path: path.read_bytes() for path in files[len(files) * 4 // 5 :]}
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in files if path not in lost}
    assert peak_megabytes(tmp_path, *commands["large"]) - peaks["small"] < 300
    assert all(path.stat().st_mtime_ns == time_written for path, time_written in kept.items())
    assert all(path.read_bytes() == content for path, content in lost.items())
