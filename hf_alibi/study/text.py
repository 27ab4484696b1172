"""The text of a study: one tokenizer, trained on the training text, and each text tokenised once.

Texts have names. `train` is for training and for the tokenizer. `validation` is for the loss along training and for
the sweep; if it is not given, about 5% of the documents of `train` are held out. Every other text is for tests.
Without another text, tests read what the evaluations have left of `validation`.

A test should not be about one document. So evaluations and tests read the middle of several documents, in equal parts.

Without any text, `train` and `validation` are the source files of Python's standard library.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..text.encoding import Encoder
from ..training.data import load_file_corpus, standard_library_corpus, train_tokenizer
from .files import read_json, write_json
from .plan import Plan
from .runs import all_runs
from .testing import SEGMENT

TRAIN, VALIDATION = "train", "validation"
HELD_OUT = 5
# Documents that an evaluation or a test takes its text from, if they are long enough.
DOCUMENTS = 16
# Rows of the recall tests begin anywhere in a text of at least this many times their length.
ROOM = 2

Documents = dict[str, Iterable[str]]


def parse_texts(given: Sequence[str]) -> dict[str, list[str]]:
    """Returns the files of each text from `NAME=FILES`, where FILES is a path or a glob pattern.

    Raises:
        UserError: If one of them has another form, or none is called `train`.
    """
    texts: dict[str, list[str]] = {}
    for item in given:
        name, equals, pattern = item.partition("=")
        if not equals or not pattern or not name.isidentifier():
            raise UserError(f"--text takes NAME=FILES, such as train=books.jsonl, not {item!r}")
        texts.setdefault(name, []).append(pattern)
    if texts and TRAIN not in texts:
        raise UserError(f"--text needs a text called {TRAIN}, only got {', '.join(texts)}")
    return texts


def prepare_text(plan: Plan, texts: Mapping[str, list[str]], folder: Path) -> dict[str, Any]:
    """Makes the tokenizer and the tokens in `folder`, unless they are there.

    Returns:
        What identifies the text: for each array its number of tokens and their SHA-256, and `tests`, the names of the
        arrays to test on.

    Raises:
        UserError: If a file is missing, a text is too short, or `folder` holds other texts.
    """
    request: dict[str, Any] = {
        "texts": {name: _identity(files) for name, files in texts.items()},
        "sizes": sizes(plan),
    }
    record_path = folder / "text.json"
    record = read_json(record_path)
    if record is not None:
        if texts and record["request"] != request:
            raise UserError(f"{folder} holds other texts, or those of another plan; give another --output_dir")
        if record["request"]["sizes"] != request["sizes"]:
            raise UserError(
                f"{folder} holds the text of another version of this plan; remove it to have it made again"
            )
        return record["arrays"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = request["sizes"]
    documents = _documents(texts)
    tokenizer = train_tokenizer(documents[TRAIN], wanted["vocab_size"])
    tokenizer.save_pretrained(folder / "tokenizer")
    arrays: dict[str, Any] = {TRAIN: _write(tokenizer, documents[TRAIN], wanted[TRAIN], folder / "train.npy")}
    _require(arrays[TRAIN], TRAIN, max(plan.training.lengths))
    tests = [name for name in documents if name not in (TRAIN, VALIDATION)]
    held_out = wanted[VALIDATION] + (0 if tests else wanted["test"])
    piece = 2 * max(plan.test.lengths)
    arrays[VALIDATION] = _write(tokenizer, documents[VALIDATION], held_out, folder / "validation.npy", piece)
    _require(arrays[VALIDATION], VALIDATION, held_out)
    if not tests:
        rest = np.load(folder / "validation.npy")[wanted[VALIDATION] :]
        tests = ["held_out"]
        arrays["held_out"] = _save(rest, folder / "held_out.npy")
    else:
        for name in tests:
            arrays[name] = _write(tokenizer, documents[name], wanted["test"], folder / f"{name}.npy", piece)
            _require(arrays[name], name, wanted["test"])
    arrays["tests"] = sorted(tests)
    write_json(record_path, {"request": request, "arrays": arrays})
    return arrays


def sizes(plan: Plan) -> dict[str, int]:
    """Returns the vocabulary, and how many tokens of each text the plan needs at most."""
    test = plan.test
    distances = [*test.copy_distances, *(plan.recall.distances if plan.recall else [])]
    rows = ROOM * (max(distances, default=0) + SEGMENT)
    return {
        "vocab_size": plan.model["vocab_size"],
        TRAIN: plan.training.text_tokens or max(run.tokens for run in all_runs(plan)),
        VALIDATION: plan.training.evaluation_tokens,
        "test": max(test.tokens, rows) + 1,
    }


def _identity(patterns: Sequence[str]) -> list[str]:
    """Returns the patterns without their folders, which differ between machines."""
    return [Path(pattern).name for pattern in patterns]


def _documents(texts: Mapping[str, list[str]]) -> Documents:
    if not texts:
        corpus = standard_library_corpus()
        return {name: corpus[name]["text"] for name in (TRAIN, VALIDATION)}
    splits = {
        name: [
            load_file_corpus(
                pattern,
                streaming=True,
                validation_percentage=HELD_OUT if name == TRAIN and VALIDATION not in texts else 0,
            )
            for pattern in patterns
        ]
        for name, patterns in texts.items()
    }
    documents: Documents = {name: Chained([split["train"] for split in parts]) for name, parts in splits.items()}
    if VALIDATION not in documents:
        documents[VALIDATION] = Chained([split["validation"] for split in splits[TRAIN]])
    return documents


class Chained:
    """The texts of several streamed datasets, one after the other. It can be read more than once."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[str]:
        return (row["text"] for row in chain.from_iterable(self.parts))


def _write(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], wanted: int, path: Path, piece: int | None = None
) -> dict[str, Any]:
    """Tokenises documents until there are `wanted` tokens, each document ending with the end-of-text token.

    Args:
        tokenizer: Of the study.
        documents: The text.
        wanted: Tokens to write.
        path: The file.
        piece: Take the middle of `DOCUMENTS` documents at a time, in parts that are multiples of so many tokens where
            documents are long enough; None for whole documents.
    """
    encoder = Encoder(tokenizer)
    pieces: list[np.ndarray] = []
    batch: list[np.ndarray] = []
    left = wanted
    for document in chain(documents, [None]):
        if document is not None:
            (ids,) = encoder([document])
            batch.append(np.append(ids, np.int32(tokenizer.eos_token_id)))
        if document is None or piece is None or len(batch) == DOCUMENTS:
            taken = batch if piece is None else _middles(batch, left, piece)
            pieces += taken
            left -= sum(map(len, taken))
            batch = []
        if left <= 0:
            break
    return _save(np.concatenate(pieces)[:wanted], path)


def _middles(documents: list[np.ndarray], wanted: int, piece: int) -> list[np.ndarray]:
    """Returns about `wanted` tokens from the middle of documents, in equal parts where documents are long enough."""
    parts: list[np.ndarray] = []
    # Long documents come last, and make up for the short ones.
    for number, ids in enumerate(sorted(documents, key=len)):
        share = -(-wanted // (len(documents) - number))
        share = -(-share // piece) * piece
        start = max(0, len(ids) - share) // 2
        parts.append(ids[start : start + share])
        wanted -= len(parts[-1])
        if wanted <= 0:
            break
    return parts


def _save(tokens: np.ndarray, path: Path) -> dict[str, Any]:
    np.save(path, tokens)
    return {"tokens": len(tokens), "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}


def _require(record: Mapping[str, Any], name: str, wanted: int) -> None:
    if record["tokens"] < wanted:
        raise UserError(f"the text {name} has {record['tokens']:,} tokens, but the plan needs {wanted:,} of it")
