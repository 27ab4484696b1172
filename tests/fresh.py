"""Load checkpoints in a new process that has torch and transformers and what these require, and nothing else."""

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from safetensors.torch import load_file
from torch import Tensor

PROGRAM = Path(__file__).with_name("fresh_program.py")


@dataclass
class Request:
    """A checkpoint to load; its outputs for `input_ids` and greedy continuations with these caches are wanted."""

    checkpoint: str
    input_ids: list[list[int]]
    auto_class: str = "AutoModelForCausalLM"
    revision: str | None = None
    caches: list[str] = field(default_factory=list)


def run_fresh(
    requests: dict[str, Request], folder: Path, environment: dict[str, str] | None = None
) -> dict[str, Tensor]:
    """What the requests yield: "name logits" and other outputs, "name cache" with tokens, "name is remote".

    Works in the empty `folder`, caches of the Hub included.
    """
    link_packages(["torch", "transformers"], folder / "site-packages")
    (folder / "requests.json").write_text(json.dumps({name: asdict(request) for name, request in requests.items()}))
    arguments = [folder / "site-packages", folder / "requests.json", folder / "results.safetensors"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", PROGRAM, *arguments],
        env=os.environ | {"HF_HOME": str(folder / "home")} | (environment or {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return load_file(folder / "results.safetensors")


def link_packages(names: list[str], folder: Path) -> None:
    """Make `folder` a site-packages of links to these installed distributions and all that they require."""
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
