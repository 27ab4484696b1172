"""A pickle that shows whether somebody has unpickled it."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path


class Bomb:
    """Makes the folder `crater` when it is unpickled."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.crater),)


def write_bomb(path: Path, crater: Path) -> None:
    """Write a pickle to `path` that makes the folder `crater`."""
    path.write_bytes(pickle.dumps(Bomb(crater)))
