"""A streamed corpus as Trainer reads it: passes without end, each in an order of its own, and a digest of them.

Trainer knows the length of a pass only for a dataset that has one. For a stream it counts all steps as one pass, so
when it resumes it skips all batches of all passes in the first, and begins the second anew. Here all passes are one.
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
"""Blocks of a streaming dataset among which the next one is drawn; map-style datasets are shuffled as a whole."""

# Data loaders read ahead by two steps at most, so the digest of the step that is saved is one of the last.
DIGESTS_KEPT = 4


class EndlessStream(torch.utils.data.IterableDataset):
    """Yields each of `blocks` once a pass, for ever, in an order that follows from the seed and the pass.

    Attributes:
        blocks_per_step: How many blocks one step of the optimizer takes, in all processes.
        digests: Pairs of how many blocks have been read and the SHA-256 of their tokens, for the last steps.
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
            # One of several worker processes may have got no part of the stream.
            if read == before:
                return

    def state(self, steps: int) -> dict[str, Any]:
        """How many blocks `steps` take, and their digest; None if other processes than this one have read them."""
        blocks = steps * self.blocks_per_step
        return {"blocks": blocks, "sha256": dict(self.digests).get(blocks)}

    def expect(self, state: dict[str, Any]) -> None:
        """Raise `UserError` while reading if this stream has not the `state` of an earlier run."""
        self.expected = state
        if state["sha256"] is None:
            logger.warning(
                "the streamed data cannot be compared with those of the checkpoint: worker processes have read them"
            )

    def _compare(self, read: int, digest: str) -> None:
        if read == self.expected.get("blocks") and digest != (self.expected["sha256"] or digest):
            raise UserError(f"the checkpoint is of another run, which differs in the first {read} blocks of its data")
