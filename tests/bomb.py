"""A pickle that shows whether it has been unpickled."""

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
    """Writes a pickle to `path` that makes the folder `crater`."""
    path.write_bytes(pickle.dumps(Bomb(crater)))
