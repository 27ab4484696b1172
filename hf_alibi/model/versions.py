"""The versions of Transformers and PyTorch that this code was tried with.

This code travels with checkpoints and meets versions that did not exist when it was written. It warns about them once
and goes on: most new versions change nothing here.
"""

import logging
import re
from functools import cache

import torch
import transformers

# By package, from the oldest to the newest: the tests of the model ran on each.
TRIED_VERSIONS = {"transformers": ("5.19", "5.23", "5.24"), "torch": ("2.13",)}

logger = logging.getLogger(__name__)


@cache
def warn_if_newer_than_tried() -> None:
    """Warns of an installed version that is newer than all that this code was tried with; once a process."""
    for name, installed in {"transformers": transformers.__version__, "torch": torch.__version__}.items():
        newest = TRIED_VERSIONS[name][-1]
        if _release(installed) > _release(newest):
            logger.warning(
                f"This AlibiGPT code was tried with {name} up to {newest}, and {installed} is installed. If something "
                "fails, `hf_alibi refresh` brings newer code to a checkpoint, or install "
                f"'{name}=={newest}.*'."
            )


def _release(version: str) -> tuple[int, ...]:
    """Returns the first two numbers of a version; those after them stand for corrections."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
