"""Loads checkpoints in a new Python process that cannot import this package.

The process uses the code in the checkpoint, as users without this package do. `publish` and `refresh`
do it to compare outputs.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

PROGRAM = Path(__file__).with_name("fresh_program.py")


@dataclass
class Request:
    """A checkpoint to load, and the inputs to compute its outputs for.

    Attributes:
        checkpoint: A folder, or a repository of the Hub.
        input_ids: `[batch, tokens]`; not needed with `text`.
        auto_class: The Auto class of Transformers that loads it.
        revision: Branch or commit of the repository.
        caches: For each of these values of `cache_implementation`, the model continues the input greedily.
        text: Is tokenized with the checkpoint's tokenizer, instead of `input_ids`.
    """

    checkpoint: str
    input_ids: list[list[int]] = field(default_factory=list)
    auto_class: str = "AutoModelForCausalLM"
    revision: str | None = None
    caches: list[str] = field(default_factory=list)
    text: str | None = None


class FreshProcessError(RuntimeError):
    """The process failed. The message is that of its last exception."""


def run_fresh(
    requests: Mapping[str, Request], scratch: Path, environment: Mapping[str, str], options: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Computes the outputs of checkpoints in float32, in a new process.

    Args:
        requests: By name.
        scratch: Working folder of the process, for its files.
        environment: Variables of the process.
        options: Further options of the Python interpreter.

    Returns:
        The tensors "NAME KEY" of each request: the model's outputs, such as "NAME logits", the input ids, the tokens
        of each continuation ("NAME CACHE"), and whether the model's class came with the checkpoint ("NAME is remote").

    Raises:
        FreshProcessError: If a checkpoint cannot be loaded or run.
    """
    asked, results = scratch / "requests.json", scratch / "results.safetensors"
    asked.write_text(json.dumps({name: asdict(request) for name, request in requests.items()}), encoding="utf-8")
    command = [sys.executable, "-P", *options, str(PROGRAM), str(asked.resolve()), str(results.resolve())]
    process = subprocess.run(command, env=dict(environment), cwd=scratch, capture_output=True, text=True)
    if process.returncode:
        # The last exception of a traceback begins with its class at the start of a line. Its message may have many
        # lines.
        raise FreshProcessError(re.split(r"^(?=[\w.]+(?:Error|Exception)\b)", process.stderr, flags=re.MULTILINE)[-1])
    return load_file(results)
