"""Streamed corpora for Trainer: endless passes over the data, each in its own order, with a digest of what was read.

A stream has no length, so Trainer counts all steps as one pass. When it resumes, it skips the batches of all passes in
the first pass, and would read the wrong data afterwards. Here all passes are one endless stream, so that skipping is
right. Skipping reads and tokenises the data again. The state of a stream of `datasets` would be faster to restore, but
it does not hold the shuffle buffer, so blocks would be lost.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset

from ..errors import UserError

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER_SIZE = 1000
"""Size of the buffer from which the next block of a stream is drawn. Map-style datasets are shuffled as a whole."""

# A data loader reads at most two steps ahead, so the digest of a saved step is among the last few.
DIGESTS_KEPT = 4


class EndlessStream(torch.utils.data.IterableDataset):
    """Yields the blocks of one or several streams without end.

    Each stream is read in passes: every block once, in an order that the seed and the pass decide, before any block
    again. With several streams, the seed decides which one gives the next block, with the probabilities `weights`.

    Attributes:
        blocks_per_step: Blocks that one step of the optimizer takes, in all processes together.
        digests: For the last few steps, the number of blocks read so far and the SHA-256 of their tokens.
    """

    def __init__(self, parts: Sequence[IterableDataset], seed: int, weights: Sequence[float] = (1.0,)) -> None:
        self.parts = list(parts)
        self.weights = np.array(weights) / sum(weights)
        self.seed = seed
        self.blocks_per_step = 1
        self.digests: deque[tuple[int, str]] = deque(maxlen=DIGESTS_KEPT)
        self.expected: dict[str, Any] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        digest = hashlib.sha256()
        for read, block in enumerate(self._mixed(), 1):
            for name in sorted(block):
                digest.update(f"{name} {len(block[name])} ".encode())
                digest.update(np.asarray(block[name], dtype=np.int64).tobytes())
            if read % self.blocks_per_step == 0:
                self.digests.append((read, digest.hexdigest()))
                self._compare(read, digest.hexdigest())
            yield block

    def _mixed(self) -> Iterator[dict[str, Any]]:
        passes = [self._passes(part) for part in range(len(self.parts))]
        weights = self.weights.copy()
        draws = np.random.default_rng([self.seed, len(self.parts)])
        while weights.any():
            part = int(np.searchsorted(np.cumsum(weights), draws.random() * weights.sum(), "right"))
            block = next(passes[part], None)
            if block is None:
                weights[part] = 0.0
            else:
                yield block

    def _passes(self, part: int) -> Iterator[dict[str, Any]]:
        """Yields the blocks of one stream, pass after pass."""
        for number in count():
            order = np.random.default_rng([self.seed, number, part] if len(self.parts) > 1 else [self.seed, number])
            block = None
            for block in self.parts[part].shuffle(generator=order, buffer_size=SHUFFLE_BUFFER_SIZE):
                yield block
            # With several worker processes, one may have no part of the stream. It would loop here without end.
            if block is None:
                return

    def check_workers(self, num_workers: int) -> None:
        """Raises `UserError` if a worker process would have no part of one stream, so that shares would be wrong."""
        shards = [part.num_shards for part in self.parts]
        if len(self.parts) > 1 and num_workers > min(shards):
            raise UserError(
                f"--dataloader_num_workers {num_workers} is too many for a mixture of streams with {shards} files: "
                f"each worker needs a file of each, so give at most {min(shards)}"
            )

    def state(self, steps: int) -> dict[str, Any]:
        """Returns the number of blocks in `steps`, and their digest, which is None if worker processes read them."""
        blocks = steps * self.blocks_per_step
        return {"blocks": blocks, "sha256": dict(self.digests).get(blocks)}

    def expect(self, state: dict[str, Any]) -> None:
        """Makes reading raise `UserError` if the data differ from those of an earlier run with this `state`."""
        self.expected = state
        if state["sha256"] is None:
            logger.warning(
                "the streamed data cannot be compared with those of the checkpoint: worker processes have read them"
            )

    def _compare(self, read: int, digest: str) -> None:
        if read == self.expected.get("blocks") and digest != (self.expected["sha256"] or digest):
            raise UserError(f"the checkpoint is of another run, which differs in the first {read} blocks of its data")
