"""The versions of Transformers and PyTorch that this code was tested with.

This code is saved with checkpoints, so it may run with versions that did not exist when it was written. It then logs
one warning, not an error, because most new versions change nothing that matters here.
"""

import logging
import re
from functools import cache

import torch
import transformers

# Versions by package, from old to new. The tests of the model ran with each of them.
TRIED_VERSIONS = {"transformers": ("5.19", "5.23", "5.24"), "torch": ("2.13",)}

logger = logging.getLogger(__name__)


@cache
def warn_if_newer_than_tried() -> None:
    """Logs a warning if an installed version is newer than all tested ones; once per process."""
    for name, installed in {"transformers": transformers.__version__, "torch": torch.__version__}.items():
        newest = TRIED_VERSIONS[name][-1]
        if _release(installed) > _release(newest):
            logger.warning(
                f"This AlibiGPT code was tested with {name} up to {newest}, but {installed} is installed. If "
                "something fails, update the code of the checkpoint with `hf_alibi refresh`, or install "
                f"'{name}=={newest}.*'."
            )


def _release(version: str) -> tuple[int, ...]:
    """Returns the first two numbers of a version. The others count bug fixes."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
