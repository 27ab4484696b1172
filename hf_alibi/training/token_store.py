"""Tokens on disk, and blocks of any size from them.

A store is a folder of files `tokens-00000.safetensors`, … Each has two tensors:

- `tokens`, `[num_tokens]`, uint16 or uint32: the documents one after another, each with its end-of-text token.
- `ends`, `[num_ends]`, int64: the places in this file after the last token of each document that ends in it.

A document may go on in the next file. The metadata of a file say how many pieces of text it was made from, and have
the SHA-256 of these pieces (`text`) and of the tensors (`content`). Files are memory-mapped when they are read, so a
store may be larger than the memory, and all processes of a machine share it. A file is written under another name
first, so it is complete if it has its name.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import UserError
from .packing import positions

METADATA = "hf_alibi"
FILE_NAME = "tokens-{:05d}.safetensors"

TOKENS_PER_FILE = 1 << 24
"""About 70 MB of English text: what is lost if writing is killed. A file is in memory until it is written."""


class StoreWriter:
    """Appends tokens to a store.

    Args:
        folder: Of the store; it may have files already.
        vocab_size: Number of different tokens.
        written: How many files it has.
    """

    def __init__(self, folder: Path, vocab_size: int, written: int = 0) -> None:
        self.folder = folder
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.written = written
        self._begin()

    def _begin(self) -> None:
        self.parts: list[np.ndarray] = []
        self.ends: list[int] = []
        self.num_tokens = self.pieces = 0
        self.text = hashlib.sha256()

    def add(self, piece: bytes, ids: np.ndarray, end_of_text: int | None) -> None:
        """Adds the tokens of a piece of text, and the end-of-text token if the document ends with it."""
        ids = ids if end_of_text is None else np.append(ids, end_of_text)
        self.parts.append(ids.astype(self.dtype))
        self.num_tokens += len(ids)
        self.pieces += 1
        self.text.update(piece)
        if end_of_text is not None:
            self.ends.append(self.num_tokens)
        if self.num_tokens >= TOKENS_PER_FILE:
            self.write()

    def write(self) -> None:
        """Writes what was added since the last file, if anything."""
        if not self.pieces:
            return
        tensors = {"tokens": np.concatenate(self.parts), "ends": np.array(self.ends, dtype=np.int64)}
        content = hashlib.sha256(tensors["tokens"].data)
        content.update(tensors["ends"].data)
        origin = {"pieces": self.pieces, "text": self.text.hexdigest(), "content": content.hexdigest()}
        path = self.folder / FILE_NAME.format(self.written)
        unfinished = path.with_suffix(".unfinished")
        # One entry, because safetensors writes several in any order. Its `save_file` would leave a file with a random
        # name if it is killed.
        unfinished.write_bytes(save(tensors, {METADATA: json.dumps(origin)}))
        os.replace(unfinished, path)
        self.written += 1
        self._begin()


class TokenStore:
    """Reads a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = sorted(folder.glob(FILE_NAME.replace("{:05d}", "*")))
        if [path.name for path in self.paths] != [FILE_NAME.format(number) for number in range(len(self.paths))]:
            raise UserError(f"{folder} lacks some of its files: {self.paths[-1].name} is not number {len(self.paths)}")
        self._open: dict[int, Any] = {}
        lengths = [self._file(number).get_slice("tokens").get_shape()[0] for number in range(len(self.paths))]
        self.bounds = np.cumsum([0, *lengths])

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be sent to another process.
        return vars(self) | {"_open": {}}

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return int(self.bounds[-1])

    def origins(self) -> Iterator[dict[str, Any]]:
        """Yields the metadata of each file."""
        for number in range(len(self.paths)):
            yield json.loads(self._file(number).metadata()[METADATA])

    def num_documents(self) -> int:
        """Returns the number of documents that are complete."""
        return sum(self._file(number).get_slice("ends").get_shape()[0] for number in range(len(self.paths)))

    def read(self, begin: int, end: int) -> np.ndarray:
        """Returns the tokens from `begin` to `end` as int32."""
        parts = [
            self._file(number).get_slice("tokens")[low:high].astype(np.int32)
            for number, low, high in self._files(begin, end)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def starts(self, begin: int, end: int) -> np.ndarray:
        """Returns where documents start after `begin` and before `end`, counted from `begin`. 0 is the first."""
        found = [np.zeros(1, dtype=np.int64)]
        for number, low, high in self._files(begin, end):
            # A document that ends where a file ends is followed by one in the next file.
            ends = self._ends(number)
            ends = ends[np.searchsorted(ends, low, "right") : np.searchsorted(ends, high, "right")]
            found.append(ends + int(self.bounds[number]) - begin)
        starts = np.concatenate(found)
        return starts[starts < end - begin]

    def _files(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yields the files that have these tokens, and the places of the first and after the last in each."""
        number = int(np.searchsorted(self.bounds, begin, "right")) - 1
        while begin < end:
            offset, until = int(self.bounds[number]), min(end, int(self.bounds[number + 1]))
            yield number, begin - offset, until - offset
            begin, number = until, number + 1

    def _file(self, number: int) -> Any:
        if number not in self._open:
            try:
                self._open[number] = safe_open(self.paths[number], "np")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.paths[number]} cannot be read: {error}") from error
        return self._open[number]

    def _ends(self, number: int) -> np.ndarray:
        key = -1 - number
        if key not in self._open:
            self._open[key] = self._file(number).get_tensor("ends")
        return self._open[key]


class TokenBlocks(torch.utils.data.Dataset):
    """Blocks of `block_size` tokens from a store, as `hf_alibi.training.packing.pack` gives them for one batch.

    Args:
        store: The tokens.
        block_size: Tokens per block, at least 3. The last block may be shorter. If it had only one token, it gets a
            second one from the block before.
        isolate_documents: Whether there is a column `position_ids`, which restarts with each document.
        limit: Most blocks.
    """

    def __init__(
        self, store: TokenStore, block_size: int, isolate_documents: bool = False, limit: int | None = None
    ) -> None:
        if block_size < 3:
            raise UserError(f"block_size must be at least 3, so that every block has a token to predict: {block_size}")
        if len(store) < 2:
            raise UserError(f"{store.folder} has {len(store)} tokens, but at least 2 are needed")
        self.store = store
        self.block_size = block_size
        self.isolate_documents = isolate_documents
        self.limit = limit

    def __len__(self) -> int:
        """Returns the number of blocks."""
        blocks = -(-len(self.store) // self.block_size)
        return blocks if self.limit is None else min(blocks, self.limit)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Returns a block."""
        # Refuses indices that are out of range, which ends iteration.
        index = range(len(self))[index]
        begin, end = self._cut(index), self._cut(index + 1)
        block = {"input_ids": self.store.read(begin, end)}
        if self.isolate_documents:
            block["position_ids"] = positions(self.store.starts(begin, end), end - begin)
        return block

    def _cut(self, number: int) -> int:
        total = len(self.store)
        cut = min(number * self.block_size, total)
        return cut - 1 if cut == total - 1 else cut

    def take(self, limit: int) -> "TokenBlocks":
        """Returns only the first `limit` blocks."""
        return TokenBlocks(self.store, self.block_size, self.isolate_documents, min(limit, len(self)))

    def digest(self) -> str:
        """Returns a SHA-256 that tells blocks apart."""
        files = [origin["content"] for origin in self.store.origins()]
        identity = json.dumps([files, self.block_size, self.isolate_documents, len(self)])
        return hashlib.sha256(identity.encode()).hexdigest()
