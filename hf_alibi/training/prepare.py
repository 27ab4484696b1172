"""Tokenises a corpus once, for many runs: a folder of tokens that `hf_alibi train` reads.

The folder has the tokenizer, a token store (see `hf_alibi.training.token_store`) for each split, and `prepared.json`,
which records the tokenizer's digest, the arguments, the source files, and whether all is written. Documents are read
one at a time and tokenised in pieces, so memory grows neither with the corpus nor with a document.

If preparing is killed, the same command continues it: files that are complete stay, and their texts are read again
only to compare them. The finished folder is byte for byte that of an uninterrupted run, with any number of workers.
"""

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from itertools import islice
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..hub.files import make_tokenizer_portable
from ..text.encoding import Encoder, describe, in_batches
from .data import Corpus
from .packing import require_end_of_text
from .token_store import StoreWriter, TokenBlocks, TokenStore

RECORD = "prepared.json"
FORMAT = 1

Piece = tuple[str, bool]
"""A piece of a document, and whether it is the last one."""


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a SHA-256 of everything that decides the tokens of a document."""
    identity: dict[str, Any] = {"vocabulary": tokenizer.get_vocab(), "end_of_text": tokenizer.eos_token_id}
    if description := describe(tokenizer):
        parts = json.loads(description)
        identity |= {name: parts[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    else:
        identity["class"] = type(tokenizer).__name__
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def prepare(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    record: Mapping[str, Any],
    num_workers: int | None = None,
) -> dict[str, dict[str, int]]:
    """Tokenises the splits of `corpus` into `folder`, and prints the throughput.

    Args:
        corpus: Map-style or streaming, with the column `text`.
        tokenizer: It must have an end-of-text token.
        folder: New, empty, or left by a run of this function that was interrupted.
        record: What else the folder should say about its origin, such as the arguments. A run that continues must have
            the same `arguments`.
        num_workers: Processes that tokenise; None for this process alone.

    Returns:
        The numbers of `documents` and `tokens` of each split.

    Raises:
        UserError: If the folder is not empty and belongs to another tokenizer, other arguments or other texts.
    """
    require_end_of_text(tokenizer)
    record = {"format": FORMAT, "tokenizer": tokenizer_digest(tokenizer), **record}
    begin(folder, record)
    tokenizer.save_pretrained(folder)
    make_tokenizer_portable(folder)
    splits = {}
    with _pool(tokenizer, num_workers) as pool:
        for split, documents in corpus.items():
            (folder / split).mkdir(exist_ok=True)
            splits[split] = _prepare_split(split, documents, tokenizer, folder / split, pool, num_workers or 1)
    _write(folder, {**record, "splits": splits, "complete": True})
    return splits


def begin(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes an incomplete record to a new folder. Raises `UserError` if the folder has something else."""
    if (folder / RECORD).is_file():
        earlier = _read(folder)
        for name in ("format", "tokenizer", "arguments"):
            if record.get(name) != earlier.get(name):
                raise UserError(
                    f"{folder} was begun with another {name}: {json.dumps(earlier.get(name))}, "
                    f"not {json.dumps(record.get(name))}; give the same, or another --output_dir"
                )
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder, and not one of hf_alibi prepare: give another --output_dir")
    else:
        folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {**record, "complete": False})


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    unfinished = folder / f"{RECORD}.unfinished"
    unfinished.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", "utf-8")
    os.replace(unfinished, folder / RECORD)


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RECORD).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RECORD} cannot be read: {error}; hf_alibi prepare writes it") from error


def _prepare_split(
    split: str,
    documents: Iterable[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    pool: ProcessPoolExecutor | None,
    num_workers: int,
) -> dict[str, int]:
    """Tokenises one split, after the pieces that are in complete files."""
    encoder = Encoder(tokenizer)
    start, num_bytes = time.perf_counter(), 0
    # A bar would flood a log file: None shows it only in a terminal.
    with tqdm(desc=split, unit="B", unit_scale=True, disable=None) as bar:
        pieces = _pieces(documents, encoder, bar)
        writer = StoreWriter(folder, len(tokenizer), _skip_written(folder, pieces))
        encoded = _encoded(pieces, encoder, pool, 2 * num_workers)
        for (piece, is_last), ids in encoded:
            data = piece.encode()
            writer.add(data, ids, tokenizer.eos_token_id if is_last else None)
            num_bytes += len(data)
        writer.write()
    store = TokenStore(folder)
    seconds = time.perf_counter() - start
    counts = {"documents": store.num_documents(), "tokens": len(store)}
    print(
        f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens; "
        f"{num_bytes / 1e6:,.1f} MB in {seconds:,.1f} s, {num_bytes / 1e6 / seconds:,.1f} MB/s",
        flush=True,
    )
    return counts


def _pieces(documents: Iterable[Mapping[str, str]], encoder: Encoder, bar: Any) -> Iterator[Piece]:
    for document in documents:
        remaining = iter(encoder.pieces(document["text"]))
        piece = next(remaining)
        for following in remaining:
            yield piece, False
            piece = following
        yield piece, True
        bar.update(len(document["text"]))


def _skip_written(folder: Path, pieces: Iterator[Piece]) -> int:
    """Reads over the pieces that are in the store. Returns its number of files."""
    store = TokenStore(folder)
    for number, origin in enumerate(store.origins()):
        text = hashlib.sha256()
        for piece, _ in islice(pieces, origin["pieces"]):
            text.update(piece.encode())
        if text.hexdigest() != origin["text"]:
            raise UserError(
                f"the texts have changed since {store.paths[number]} was written: give another --output_dir"
            )
    return len(store.paths)


def _encoded(
    pieces: Iterator[Piece], encoder: Encoder, pool: ProcessPoolExecutor | None, most_waiting: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Yields each piece with its tokens, in order."""
    batches = in_batches(pieces, size=lambda piece: len(piece[0]))
    if pool is None:
        for batch in batches:
            yield from zip(batch, encoder.encode([piece for piece, _ in batch]), strict=True)
        return
    waiting: deque[tuple[list[Piece], Future[list[np.ndarray]]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_encode_in_worker, [piece for piece, _ in batch])))
        # Batches that wait are in memory.
        if len(waiting) > most_waiting:
            first, tokens = waiting.popleft()
            yield from zip(first, tokens.result(), strict=True)
    for batch, tokens in waiting:
        yield from zip(batch, tokens.result(), strict=True)


# Worker processes

_worker_encoder: list[Encoder] = []


def _pool(tokenizer: PreTrainedTokenizerBase, num_workers: int | None) -> Any:
    """Returns a pool of processes with this tokenizer, or a context of None if one process is enough."""
    if num_workers is None or num_workers < 2:
        return nullcontext()
    pool = ProcessPoolExecutor(num_workers, initializer=_begin_worker, initargs=(tokenizer,))
    # Work starts the processes. Those that start after a text was read would have all memory of this one.
    pool.submit(os.getpid)
    return pool


def _begin_worker(tokenizer: PreTrainedTokenizerBase) -> None:
    # Threads of their own would make the workers slower.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_encoder[:] = [Encoder(tokenizer)]


def _end_with_parent() -> None:
    """Ends this process if the one that started it is killed. It would wait for work without end."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(pieces: list[str]) -> list[np.ndarray]:
    return _worker_encoder[0].encode(pieces)


# Reading


def load_prepared(
    folder: Path, tokenizer: PreTrainedTokenizerBase, block_size: int, isolate_documents: bool = False
) -> dict[str, TokenBlocks]:
    """Returns the splits of a folder that `prepare` wrote, in blocks of any size.

    Raises:
        UserError: If the folder is not complete, or was made with another tokenizer than `tokenizer`.
    """
    record = _read(folder)
    if record.get("format") != FORMAT:
        raise UserError(f"{folder} has format {record.get('format')}, but only {FORMAT} is known: prepare it again")
    if not record.get("complete"):
        raise UserError(f"{folder} is not complete: repeat the command of hf_alibi prepare that was interrupted")
    if (digest := tokenizer_digest(tokenizer)) != record["tokenizer"]:
        raise UserError(
            f"{folder} was tokenised with another tokenizer ({record['tokenizer'][:12]}) than that of this run "
            f"({digest[:12]}): give --tokenizer_name {folder}, or prepare the data with this tokenizer"
        )
    blocks = {}
    for split, counts in record["splits"].items():
        store = TokenStore(folder / split)
        if len(store) != counts["tokens"]:
            raise UserError(
                f"{folder / split} has {len(store):,} of its {counts['tokens']:,} tokens: files are missing"
            )
        blocks[split] = TokenBlocks(store, block_size, isolate_documents)
    return blocks
