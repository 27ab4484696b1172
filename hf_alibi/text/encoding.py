"""From documents to token ids: as fast as the words repeat, and in little memory for long documents.

`Encoder` gives the token ids of `tokenizer(text, add_special_tokens=False, split_special_tokens=True)`. It differs in
two ways. Long documents are cut into pieces where that changes no token (see `hf_alibi.text.cutting`), so memory does
not grow with the length of a document: the package tokenizers needs about 270 bytes per character of a text. And the
tokens of each word are kept, so a word is tokenised once and then looked up. Most words have occurred before.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from .cutting import Cutter

PIECE_SIZE = 1 << 16
"""Characters in a piece of a document. Larger pieces take more memory and are no faster."""

BATCH_SIZE = 1 << 20
"""Characters that are tokenised together."""

Item = TypeVar("Item")

# Characters in the words that are kept, about 100 MB with their tokens.
MOST_KEPT = 1 << 22


def in_batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Yields the items in lists that just reach `BATCH_SIZE` together. The last one may be smaller."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= BATCH_SIZE:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def describe(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the JSON of the backend of a tokenizer. None if it has none, or one with parts written in Python."""
    if not isinstance(tokenizer, TokenizersBackend):
        return None
    try:
        return tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        # The class that the package raises for components of Python.
        if type(error) is not Exception:
            raise
        return None


class Encoder:
    """Tokenises documents. Special tokens that are spelled out in a document are plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.backend: Tokenizer | None = None
        self.cutter: Cutter | None = None
        description = describe(tokenizer)
        # Some classes of Transformers do more than their backend.
        if description and type(tokenizer)._encode_plus is TokenizersBackend._encode_plus:
            # A copy, because the settings of the tokenizer itself are not ours to change.
            self.backend = Tokenizer.from_str(description)
            self.backend.no_truncation()
            self.backend.no_padding()
            self.backend.encode_special_tokens = True
            self.cutter = Cutter(self.backend)
        self._forget()

    def __getstate__(self) -> PreTrainedTokenizerBase:
        # What was learned is not part of the identity, by which `datasets` finds its cached results.
        return self.tokenizer

    def __setstate__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.__init__(tokenizer)  # type: ignore[misc]

    def __call__(self, documents: Iterable[str]) -> list[np.ndarray]:
        """Returns the token ids of each document, as arrays of int32."""
        parts: list[list[np.ndarray]] = []

        def owned_pieces() -> Iterator[tuple[list[np.ndarray], str]]:
            for document in documents:
                parts.append([])
                yield from ((parts[-1], piece) for piece in self.pieces(document))

        for batch in in_batches(owned_pieces(), size=lambda owned: len(owned[1])):
            for (owner, _), ids in zip(batch, self.encode([piece for _, piece in batch]), strict=True):
                owner.append(ids)
        return [np.concatenate(arrays) for arrays in parts]

    def pieces(self, document: str, size: int = PIECE_SIZE) -> Iterator[str]:
        """Yields parts of at least `size` characters, whose tokens are together those of the document.

        Documents of tokenizers that have no certain place to cut are one piece.
        """
        yield from self.cutter.pieces(document, size) if self.cutter else [document]

    def encode_one(self, piece: str) -> np.ndarray:
        """Returns the token ids of one piece."""
        return self.encode([piece])[0]

    def encode(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """Returns the token ids of each piece, as arrays of int32."""
        if self.backend is None or self.cutter is None:
            options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return [np.array(self.tokenizer(piece, **options)["input_ids"], dtype=np.int32) for piece in pieces]
        if self.cutter.place is None:
            encodings = self.backend.encode_batch_fast(list(pieces), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        words = [self.cutter.units(piece) for piece in pieces]
        return self._look_up(list(chain(*words)), np.cumsum([len(part) for part in words]))

    def _forget(self) -> None:
        self._numbers: dict[str, int] = {}
        self._starts = np.zeros(1, dtype=np.int64)
        self._tokens = np.zeros(0, dtype=np.int32)
        self._kept = 0

    def _look_up(self, words: list[str], ends: np.ndarray) -> list[np.ndarray]:
        """Returns the tokens of each piece, given the words of all pieces and the end of each piece among them."""
        if self._kept > MOST_KEPT:
            self._forget()
        numbers = list(map(self._numbers.get, words))
        if None in numbers:
            self._learn([word for word in dict.fromkeys(words) if word not in self._numbers])
            numbers = list(map(self._numbers.get, words))
        index = np.array(numbers, dtype=np.int64)
        starts = self._starts[index]
        lengths = self._starts[index + 1] - starts
        token_ends = np.cumsum(lengths)
        # Where each token of the pieces is kept.
        places = np.repeat(starts - (token_ends - lengths), lengths) + np.arange(lengths.sum())
        token_ends = np.concatenate([[0], token_ends])
        return np.split(self._tokens[places], token_ends[ends[:-1]])

    def _learn(self, words: list[str]) -> None:
        """Tokenises these words and keeps their tokens."""
        assert self.backend is not None
        encoded = [encoding.ids for encoding in self.backend.encode_batch_fast(words, add_special_tokens=False)]
        self._numbers.update(zip(words, count(len(self._numbers)), strict=False))
        ends = self._starts[-1] + np.cumsum([len(ids) for ids in encoded])
        self._starts = np.concatenate([self._starts, ends])
        self._tokens = np.concatenate([self._tokens, np.fromiter(chain(*encoded), dtype=np.int32)])
        self._kept += sum(map(len, words))
