"""Corpora, tokenizer and packing. The packing tests compare blocks with the documents tokenised one by one."""

import glob
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ModelFactory
from datasets import Dataset, DatasetDict, IterableDatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_alibi.errors import UserError
from hf_alibi.hub.files import make_tokenizer_portable
from hf_alibi.training.data import (
    load_file_corpus,
    load_hub_corpus,
    standard_library_corpus,
    train_tokenizer,
)
from hf_alibi.training.packing import collate_blocks, pack

pytestmark = pytest.mark.usefixtures("datasets_cache")

ODD_TEXTS = {
    "emoji": "👩‍👩‍👧‍👦 and 🏳️‍🌈",
    "tabs and spaces": "\tif x:\n\t  \t return   y  \n",
    "carriage returns": "a\r\nb\rc\n",
    "control characters": "\x00\x01\x7f\u200b\ufeff",
    "special tokens": "a<|endoftext|>b <|padding|>",
    "many scripts": "žluťoučký 中文 العربية e\u0301 ﬁ",
    "spaces": "   ",
}


@pytest.fixture(scope="module")
def library() -> DatasetDict:
    return standard_library_corpus()


@pytest.fixture(scope="module")
def tokenizer(library: DatasetDict) -> PreTrainedTokenizerBase:
    return train_tokenizer(library["train"]["text"], 1024, max_characters=500_000)


def random_documents(seed: int) -> list[str]:
    generator = random.Random(seed)
    words = ["def", "return ", "\n    ", "é", "x", "<|endoftext|>", "0123456789"]
    return [
        "".join(generator.choices(words, k=generator.choice([1, 2, 7, 60]))) for _ in range(generator.randint(1, 40))
    ]


def tokenised(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [
        [*tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]
        for text in documents
    ]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_library_splits_are_disjoint_and_repeatable(library: DatasetDict) -> None:
    train, validation = set(library["train"]["text"]), set(library["validation"]["text"])
    assert not train & validation
    assert 0.05 < len(validation) / (len(train) + len(validation)) < 0.2
    assert standard_library_corpus()["validation"]["text"][:] == library["validation"]["text"][:]


def test_library_validation_has_documents_beyond_16k_tokens(
    library: DatasetDict, tokenizer: PreTrainedTokenizerBase
) -> None:
    full = train_tokenizer(library["train"]["text"], 4096)
    lengths = [len(ids) for ids in tokenised(library["validation"]["text"], full)]
    assert sum(length > 16_384 for length in lengths) >= 3


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
@pytest.mark.parametrize("split_special_tokens", [False, True], ids=["special", "plain"])
def test_tokenizer_returns_the_same_text(
    tokenizer: PreTrainedTokenizerBase, text: str, split_special_tokens: bool
) -> None:
    ids = tokenizer(text, split_special_tokens=split_special_tokens)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_saved_tokenizer_is_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(ODD_TEXTS.values())
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|padding|>")
    assert loaded.model_max_length > 10**9
    assert loaded.chat_template == tokenizer.chat_template


def test_saved_tokenizer_names_a_class_that_every_version_of_transformers_has(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def saved_class(folder: Path) -> str:
        return json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]

    tokenizer.save_pretrained(tmp_path)
    assert saved_class(tmp_path) == "PreTrainedTokenizerFast"
    # A loaded tokenizer has Transformers' own class, which saves itself under the other name.
    AutoTokenizer.from_pretrained(tmp_path, token="hf_secret").save_pretrained(tmp_path / "again")
    make_tokenizer_portable(tmp_path / "again")
    assert saved_class(tmp_path / "again") == "PreTrainedTokenizerFast"
    assert "hf_secret" not in (tmp_path / "again" / "tokenizer_config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "again").get_vocab() == tokenizer.get_vocab()


def test_what_a_tokenizer_was_loaded_with_is_not_saved(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | {"token": "hf_secret", "is_local": True, "cache_dir": "/home/me"}))
    make_tokenizer_portable(tmp_path)
    assert json.loads(path.read_text()) == {name: plain[name] for name in plain if name != "is_local"}


def test_conversation_is_a_document_for_each_message(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Who?\nMe?"}, {"role": "assistant", "content": "You."}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert prompt == "user\nWho?\nMe?<|endoftext|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "You.<|endoftext|>"


def test_tokenizer_training_is_deterministic() -> None:
    documents = random_documents(0)
    first = train_tokenizer(documents, 300).backend_tokenizer.to_str()
    assert train_tokenizer(documents, 300).backend_tokenizer.to_str() == first


def test_tokenizer_training_stops_at_its_share_of_an_endless_stream() -> None:
    capped = train_tokenizer(repeat("abc"), 300, max_characters=7)
    whole = train_tokenizer(["abc", "abc", "a"], 300)
    assert capped.backend_tokenizer.to_str() == whole.backend_tokenizer.to_str()


def test_tokenizer_too_small_for_the_bytes() -> None:
    with pytest.raises(UserError, match="at least 258 entries, not 257"):
        train_tokenizer(["text"], 257)


@pytest.mark.parametrize("isolate_documents", [False, True], ids=["crossing", "isolated"])
@pytest.mark.parametrize("block_size", [3, 4, 7, 64, 100_000])
def test_packing_loses_nothing(tokenizer: PreTrainedTokenizerBase, block_size: int, isolate_documents: bool) -> None:
    for seed in range(8):
        texts = random_documents(seed)
        blocks = pack(Dataset.from_dict({"text": texts}), tokenizer, block_size, isolate_documents)
        ids = tokenised(texts, tokenizer)
        assert list(chain(*blocks["input_ids"])) == list(chain(*ids))
        lengths = [len(block) for block in blocks["input_ids"]]
        assert all(length == block_size for length in lengths[:-2])
        assert all(2 <= length <= block_size for length in lengths)
        assert len(lengths) == -(-sum(map(len, ids)) // block_size)
        if isolate_documents:
            assert list(chain(*blocks["position_ids"])) == positions_one_by_one(ids, lengths)


def positions_one_by_one(documents: list[list[int]], block_lengths: list[int]) -> list[int]:
    """Computes positions by definition, in a loop that starts again at each document and each block."""
    block_starts = set(np.cumsum([0, *block_lengths]).tolist())
    positions: list[int] = []
    for document in documents:
        for within in range(len(document)):
            restart = within == 0 or len(positions) in block_starts
            positions.append(0 if restart else positions[-1] + 1)
    return positions


def test_a_last_token_is_not_left_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenised(["return x" * 3], tokenizer)[0]
    blocks = pack(Dataset.from_dict({"text": ["return x" * 3]}), tokenizer, len(ids) - 1, True)
    assert [len(block) for block in blocks["input_ids"]] == [len(ids) - 2, 2]
    assert blocks[1]["position_ids"] == [0, 1]


@pytest.mark.parametrize("isolate_documents", [False, True], ids=["crossing", "isolated"])
def test_streaming_packs_the_same_blocks(tokenizer: PreTrainedTokenizerBase, isolate_documents: bool) -> None:
    # More than two batches.
    documents = Dataset.from_dict({"text": [f"document {n}" for n in range(2500)]})
    blocks = pack(documents, tokenizer, 32, isolate_documents)
    streamed = pack(documents.to_iterable_dataset(), tokenizer, 32, isolate_documents)
    assert [{name: list(ids) for name, ids in block.items()} for block in streamed] == list(blocks)
    assert collate_blocks(list(streamed.take(2)))["labels"].dtype == torch.long


def test_packing_needs_an_end_of_text_token_and_a_block(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = Dataset.from_dict({"text": ["x"]})
    with pytest.raises(UserError, match="at least 3"):
        pack(documents, tokenizer, 2)
    tokenizer_without = train_tokenizer(["x"], 258)
    tokenizer_without.eos_token = None
    with pytest.raises(UserError, match="eos_token"):
        pack(documents, tokenizer_without, 8)


@pytest.mark.parametrize(
    ("name", "first", "second", "expected"),
    [
        ("position_ids", [7, 8, 2, 3, 4], [2, 3], [[7, 8, 2, 3, 4], [2, 3, 0, 1, 2]]),
        ("seq_idx", [0, 0, 1, 1, 1], [0, 0], [[0, 0, 1, 1, 1], [0, 0, 2, 2, 2]]),
        ("attention_mask", [1, 1, 2, 2, 2], [1, 1], [[1, 1, 2, 2, 2], [1, 1, 0, 0, 0]]),
    ],
)
def test_collating_knows_every_column_that_says_where_documents_end(
    name: str, first: list[int], second: list[int], expected: list[list[int]]
) -> None:
    batch = collate_blocks([{"input_ids": [5, 6, 7, 8, 9], name: first}, {"input_ids": [3, 4], name: second}])
    assert batch[name].tolist() == expected
    assert batch["labels"].tolist() == [[-100, 6, -100, 8, 9], [-100, 4, -100, -100, -100]]


def test_collating_refuses_columns_that_it_cannot_pad() -> None:
    with pytest.raises(UserError, match="columns that cannot be stacked: cu_seq_lens_q"):
        collate_blocks([{"input_ids": [5, 6], "cu_seq_lens_q": [0, 2]}])


def test_collating_full_blocks_adds_labels_only() -> None:
    batch = collate_blocks([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 5]}])
    assert set(batch) == {"input_ids", "labels"}
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["input_ids"].dtype == torch.long


def test_collating_pads_and_masks_what_cannot_be_predicted() -> None:
    batch = collate_blocks(
        [
            {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 0, 1, 2]},
            {"input_ids": [3, 4], "position_ids": [0, 1]},
        ]
    )
    assert batch["labels"].tolist() == [[-100, 6, -100, 8, 9], [-100, 4, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]
    assert batch["input_ids"][1, :2].tolist() == [3, 4]


@pytest.mark.parametrize("isolate_documents", [False, True], ids=["crossing", "isolated"])
def test_padding_does_not_change_the_loss(
    tokenizer: PreTrainedTokenizerBase, make_model: ModelFactory, isolate_documents: bool
) -> None:
    documents = Dataset.from_dict({"text": random_documents(0)})
    blocks = list(pack(documents, tokenizer, 100, isolate_documents))[-3:]
    assert len(blocks[-1]["input_ids"]) < 100
    model = make_model(vocab_size=len(tokenizer))
    with torch.no_grad():
        together = model(**collate_blocks(blocks), num_items_in_batch=1).loss
        alone = [model(**collate_blocks([block]), num_items_in_batch=1).loss for block in blocks]
    torch.testing.assert_close(together, sum(alone))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\nsecond paragraph\n")
    corpus = load_file_corpus(str(tmp_path / "*.txt"), validation_percentage=0)
    assert list(corpus) == ["train"]
    assert corpus["train"]["text"][:] == ["a\n\nsecond paragraph\n", "b\n\nsecond paragraph\n"]


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_rows_are_documents_and_some_are_held_out(tmp_path: Path, streaming: bool) -> None:
    texts = [f"document {n}" for n in range(300)]
    rows = [{"id": n, "content": text} for n, text in enumerate([*texts, "", None])]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    corpus = load_file_corpus(path, text_column="content", streaming=streaming, validation_percentage=10)
    assert isinstance(corpus, IterableDatasetDict if streaming else DatasetDict)
    splits = {name: [row["text"] for row in documents] for name, documents in corpus.items()}
    assert sorted(splits["train"] + splits["validation"]) == sorted(texts)
    assert 10 < len(splits["validation"]) < 60
    assert list(next(iter(corpus["train"]))) == ["text"]


def test_given_validation_and_parquet(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        Dataset.from_dict({"text": [split]}).to_parquet(tmp_path / f"{split}.parquet")
    corpus = load_file_corpus(str(tmp_path / "train.parquet"), str(tmp_path / "validation.parquet"))
    assert {name: documents["text"][:] for name, documents in corpus.items()} == {
        "train": ["train"],
        "validation": ["validation"],
    }


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    for text in ("first edition", "second, revised edition"):
        path.write_text(text)
        assert load_file_corpus(str(path), validation_percentage=0)["train"]["text"][:] == [text]


def test_folder_as_dataset_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "b"}])
    corpus = load_hub_corpus(str(tmp_path))
    assert corpus["validation"]["text"][:] == ["b"]


BAD_FILES = {
    "no bytes": ("empty.txt", b"", "empty"),
    "no text": ("null.jsonl", b'{"text": null}\n{"text": ""}\n', "no document with text"),
    "other column": ("column.jsonl", b'{"content": "a"}\n', "no column 'text', only content"),
    "numbers": ("numbers.jsonl", b'{"text": 1}\n', "holds int, not text"),
    "numbers further on": ("mixed.jsonl", b'{"text": "a"}\n{"text": 5}\n', "holds int further on: 5"),
    "lists further on": ("lists.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', "holds list further on"),
    "not JSON": ("broken.jsonl", b'{"text": "a"}\n{broken\n', "cannot read .*broken.jsonl"),
    "not UTF-8": ("latin.txt", b"caf\xe9", "cannot read .*latin.txt"),
    "not Parquet": ("broken.parquet", b"PAR1", "cannot read .*broken.parquet"),
    "other extension": ("notes.docx", b"PK", "cannot read '.docx' files, only .txt, "),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file(tmp_path: Path, name: str, content: bytes, message: str, streaming: bool) -> None:
    (tmp_path / name).write_bytes(content)
    # A stream raises only when it reaches the row.
    with pytest.raises(UserError, match=message):
        list(load_file_corpus(str(tmp_path / name), streaming=streaming, validation_percentage=0)["train"])


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize("name", ["book [2020].txt", "what?.txt", "a*b.txt", "[x].txt", "**.txt", "a{b,c}.txt"])
def test_a_file_is_no_pattern(tmp_path: Path, name: str, streaming: bool) -> None:
    for other in ("book 2.txt", "whatX.txt", "aXb.txt", "x.txt", "ab.txt"):
        (tmp_path / other).write_text("another file")
    (tmp_path / name).write_text("this file")
    corpus = load_file_corpus(str(tmp_path / name), streaming=streaming, validation_percentage=0)
    assert [row["text"] for row in corpus["train"]] == ["this file"]
    shutil.copyfile(tmp_path / name, tmp_path / f"copy of {name}")
    pattern = load_file_corpus(f"{glob.escape(str(tmp_path))}/copy of *.txt", validation_percentage=0)
    assert pattern["train"]["text"][:] == ["this file"]


def test_missing_file_and_mixed_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*missing\*.txt"):
        load_file_corpus(str(tmp_path / "missing*.txt"))
    (tmp_path / "a.txt").write_text("a")
    rows = write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    with pytest.raises(UserError, match="of one kind, not json and text"):
        load_file_corpus(str(tmp_path / "a.txt"), rows)


def test_too_few_documents_to_hold_any_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the only document")
    with pytest.raises(UserError, match="give a validation file"):
        load_file_corpus(str(tmp_path / "a.txt"))


def test_missing_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing here"):
        load_hub_corpus(str(tmp_path / "nothing here"))
