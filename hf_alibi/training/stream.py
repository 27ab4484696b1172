"""A streamed corpus for Trainer: endless passes over the data, each in its own order, with a digest of what was read.

A stream has no length, so Trainer counts all steps as one pass. When it resumes, it skips the batches of all passes in
the first pass, and would read the wrong data afterwards. Here all passes are one endless stream, so that skipping is
right.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Iterator
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
    """Yields each of `blocks` once per pass, without end. Seed and pass decide the order.

    Attributes:
        blocks_per_step: Blocks that one step of the optimizer takes, in all processes together.
        digests: For the last few steps, the number of blocks read so far and the SHA-256 of their tokens.
    """

    def __init__(self, blocks: IterableDataset, seed: int) -> None:
        self.blocks = blocks
        self.seed = seed
        self.blocks_per_step = 1
        self.digests: deque[tuple[int, str]] = deque(maxlen=DIGESTS_KEPT)
        self.expected: dict[str, Any] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        digest, read = hashlib.sha256(), 0
        for number in count():
            order = np.random.default_rng([self.seed, number])
            before = read
            for block in self.blocks.shuffle(generator=order, buffer_size=SHUFFLE_BUFFER_SIZE):
                for name in sorted(block):
                    digest.update(f"{name} {len(block[name])} ".encode())
                    digest.update(np.asarray(block[name], dtype=np.int64).tobytes())
                read += 1
                if read % self.blocks_per_step == 0:
                    self.digests.append((read, digest.hexdigest()))
                    self._compare(read, digest.hexdigest())
                yield block
            # With several worker processes, one may have no part of the stream. It would loop here without end.
            if read == before:
                return

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
