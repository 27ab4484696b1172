"""Loads checkpoints in a new process that has torch and transformers and what these require, and nothing else."""

import importlib.metadata
import os
from pathlib import Path

from packaging.requirements import Requirement
from torch import Tensor

from hf_alibi.hub import fresh_process
from hf_alibi.hub.fresh_process import Request

__all__ = ["Request", "run_fresh"]


def run_fresh(
    requests: dict[str, Request], folder: Path, environment: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """Returns what `fresh_process.run_fresh` does, from a process that lacks all other packages.

    Works in the empty `folder`, which also holds the caches of the Hub.
    """
    packages = folder / "site-packages"
    link_packages(["torch", "transformers"], packages)
    variables = os.environ | {"HF_HOME": str(folder / "home"), "PYTHONPATH": str(packages)} | (environment or {})
    # -S keeps the installed packages off the import path.
    return fresh_process.run_fresh(requests, folder, variables, options=["-S"])


def link_packages(names: list[str], folder: Path) -> None:
    """Makes `folder` a site-packages of links to these installed distributions and all that they require."""
    folder.mkdir()
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
