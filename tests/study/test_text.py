"""The text of a study is tokenised once, the same every time, and a folder with another text is refused."""

from pathlib import Path

import numpy as np
import pytest
from tiny_study import write_plan
from tiny_training import write_rows
from transformers import AutoTokenizer

from hf_alibi.errors import UserError
from hf_alibi.study.plan import Plan, load_plan
from hf_alibi.study.text import _middles, parse_texts, prepare_text


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return load_plan(write_plan(tmp_path))


def test_names_and_files_are_told_apart() -> None:
    found = parse_texts(["train=a.txt", "books=b=c/*.txt", "train=d.txt"])
    assert found == {"train": ["a.txt", "d.txt"], "books": ["b=c/*.txt"]}
    assert parse_texts([]) == {}


@pytest.mark.usefixtures("datasets_cache")
def test_documents_are_held_out_if_no_other_text_is_given(plan: Plan, tmp_path: Path) -> None:
    texts = {"train": [write_rows(tmp_path / "rows.jsonl", documents=1500)]}
    first = prepare_text(plan, texts, tmp_path / "first")
    assert first["tests"] == ["held_out"]
    sizes = {name: first[name]["tokens"] for name in ("train", "validation", "held_out")}
    assert sizes == {"train": 512, "validation": 128 + 257, "held_out": 257}
    arrays = {name: np.load(tmp_path / "first" / f"{name}.npy") for name in sizes}
    # Tests begin where the evaluations end.
    assert np.array_equal(arrays["validation"][128:], arrays["held_out"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first" / "tokenizer")
    documents = tokenizer.decode(arrays["train"]).split("<|endoftext|>")
    held_out = tokenizer.decode(arrays["validation"]).split("<|endoftext|>")
    assert documents[0].startswith("line 0 of document")
    assert not set(documents[:-1]) & set(held_out[:-1])
    # The same text gives the same tokens, and they are made once.
    assert prepare_text(plan, texts, tmp_path / "second") == first
    written = (tmp_path / "first" / "train.npy").stat().st_mtime_ns
    assert prepare_text(plan, texts, tmp_path / "first") == first
    assert prepare_text(plan, {}, tmp_path / "first") == first
    assert (tmp_path / "first" / "train.npy").stat().st_mtime_ns == written


@pytest.mark.usefixtures("datasets_cache")
def test_a_folder_with_another_text_is_refused(plan: Plan, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", documents=600)
    texts = {"train": [rows], "validation": [rows], "rows": [rows]}
    assert prepare_text(plan, texts, tmp_path / "text")["tests"] == ["rows"]
    with pytest.raises(UserError, match="holds other texts"):
        prepare_text(plan, {"train": [rows], "validation": [rows]}, tmp_path / "text")
    plan.test.tokens = 512
    with pytest.raises(UserError, match="another version of this plan; remove it"):
        prepare_text(plan, {}, tmp_path / "text")


@pytest.mark.parametrize(
    ("lengths", "expected"), [([100, 100, 100, 100], [8, 8]), ([3, 5, 100, 100], [3, 5, 8]), ([9], [9])]
)
def test_tests_read_the_middle_of_several_documents(lengths: list[int], expected: list[int]) -> None:
    documents = [np.arange(length) for length in lengths]
    parts = _middles(documents, 16, 8)
    assert [len(part) for part in parts] == expected
    for part in parts:
        before, after = part[0], next(len(ids) for ids in documents if len(ids) >= len(part)) - part[-1] - 1
        assert abs(before - after) <= 1
