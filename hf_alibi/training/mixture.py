"""Several data sets in given proportions, for map-style data. `hf_alibi.training.stream` mixes streams."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import UserError


class Mixture(torch.utils.data.Dataset):
    """Blocks of several data sets, in the proportions that the weights say.

    Each data set is read in passes: every block once, in an order that the seed and the pass decide, before any block
    again. An epoch of the mixture ends when one data set has been read once (`first_exhausted` in
    `datasets.interleave_datasets`). The others continue in the next epoch where they stopped, so no block is left out
    for good. Within an epoch, Trainer's sampler decides the order.

    Attributes:
        counts: How many blocks of each data set an epoch has.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float], seed: int) -> None:
        shares = np.array(weights) / sum(weights)
        size = min(len(part) / share for part, share in zip(parts, shares, strict=True))
        # A weight such as 0.3 is no exact number.
        self.counts = [int(size * share + 1e-6) for share in shares]
        if 0 in self.counts:
            raise UserError(
                f"weights {list(weights)} with {[len(part) for part in parts]} blocks give no block of one data set "
                "in an epoch: the smallest data set is too small for its weight"
            )
        self.parts, self.weights, self.seed = list(parts), list(weights), seed
        self.bounds = np.cumsum([0, *self.counts])
        # Worker processes of a data loader that live on see a new epoch in shared memory.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def set_epoch(self, epoch: int) -> None:
        """Makes the blocks those of this epoch."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        """Returns the number of blocks in an epoch."""
        return int(self.bounds[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns a block of the present epoch."""
        index = range(len(self))[index]
        part = int(np.searchsorted(self.bounds, index, "right")) - 1
        read = int(self.epoch) * self.counts[part] + index - int(self.bounds[part])
        number, place = divmod(read, len(self.parts[part]))
        return self.parts[part][int(self._order(part, number)[place])]

    def _order(self, part: int, number: int) -> np.ndarray:
        """Returns the order in which a pass reads a data set."""
        if (part, number) not in self._orders:
            # An epoch has the end of one pass and the beginning of the next.
            self._orders.pop((part, number - 2), None)
            generator = np.random.default_rng([self.seed, part, number])
            self._orders[part, number] = generator.permutation(len(self.parts[part]))
        return self._orders[part, number]
