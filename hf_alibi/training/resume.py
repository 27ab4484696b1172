"""Finds the checkpoint that an interrupted run continues from: the last one whose files can all be read.

A process that is killed while it saves, a full disk or a power cut leave files that are missing, empty or truncated.
Trainer checks none of this before it loads. `find_checkpoint` does, and falls back to the checkpoint before.
"""

import json
import logging
import pickle
import re
import zipfile
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import UserError
from .run_record import RECORD_NAME, read_record

logger = logging.getLogger(__name__)

# Names under which Trainer saves the optimizer: a file of torch, or the folders of FSDP and DeepSpeed.
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")

# What reading raises for a file that is empty, truncated or damaged, or for a pickle that would run code.
UNREADABLE = (
    OSError, ValueError, KeyError, AttributeError, RuntimeError, EOFError, SafetensorError, zipfile.BadZipFile,
    pickle.UnpicklingError,
)  # fmt: skip

FRESH_OPTIMIZER = (
    "it has weights but no {missing}, so the run cannot continue as it was; --fresh_optimizer True continues from the "
    "weights with a new optimizer"
)


def find_checkpoint(args: TrainingArguments, fresh_optimizer: bool = False) -> str | None:
    """Returns the checkpoint folder that `args.resume_from_checkpoint` asks for, or None to start at the first step.

    "True" asks for the last complete checkpoint in `args.output_dir`. A warning names each later one and what is wrong
    with it. If the run was killed before its first checkpoint, training starts again.

    Args:
        args: The output folder, and what to resume from.
        fresh_optimizer: Whether a checkpoint that has only weights is accepted.

    Raises:
        UserError: If training would overwrite what another run left in `args.output_dir`, if there is no such
            checkpoint, if it is incomplete, or if all checkpoints lack an optimizer.
    """
    output_dir = Path(str(args.output_dir))
    resume = args.resume_from_checkpoint or "False"
    if resume.lower() == "true":
        return _last_complete(output_dir, fresh_optimizer)
    if resume.lower() == "false":
        if fresh_optimizer:
            raise UserError("--fresh_optimizer needs --resume_from_checkpoint: a new run has a new optimizer anyway")
        _require_empty(output_dir)
        return None
    fault = damage(Path(resume)) or missing_state(Path(resume), fresh_optimizer)
    if fault:
        raise UserError(f"{resume} is no checkpoint to resume from: {fault}")
    if Path(resume).resolve().parent != output_dir.resolve():
        _require_empty(output_dir)
    return resume


def _last_complete(output_dir: Path, fresh_optimizer: bool) -> str | None:
    steps = {int(name[1]): folder for folder, name in _numbered(output_dir)}
    readable = None
    for step in sorted(steps, reverse=True):
        folder = steps[step]
        fault = damage(folder)
        if not fault:
            fault = missing_state(folder, fresh_optimizer)
            if not fault:
                return str(folder)
            readable = readable or f"{folder} cannot be resumed from: {fault}"
        logger.warning("%s is passed over: %s", folder, fault)
    # Starting again would discard the weights that were saved.
    if readable:
        raise UserError(readable)
    if (output_dir / CONFIG_NAME).exists():
        raise UserError(f"{output_dir} holds a model but no checkpoint to resume from; give another --output_dir")
    logger.warning("%s has no complete checkpoint: training begins at the first step", output_dir)
    return None


def _numbered(output_dir: Path) -> list[tuple[Path, re.Match[str]]]:
    """Returns the folders that Trainer made, with their numbers. Others, such as `checkpoint-best`, are the user's."""
    names = ((folder, re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)) for folder in output_dir.glob("*"))
    return [(folder, name) for folder, name in names if name and folder.is_dir()]


def _require_empty(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{folder} is not an empty folder: give another --output_dir, or continue the run in it with "
            "--resume_from_checkpoint True"
        )


def damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, or None if it has weights and every file can be read."""
    for name in (TRAINER_STATE_NAME, CONFIG_NAME):
        if not (folder / name).is_file():
            return f"it has no {name}"
    if not (folder / SAFE_WEIGHTS_NAME).is_file() and not (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return f"it has no {SAFE_WEIGHTS_NAME}"
    for path in sorted(folder.rglob("*")):
        try:
            _read(path)
        except UNREADABLE as error:
            return f"{path.relative_to(folder)} cannot be read ({shorten(str(error), 120) or type(error).__name__})"
    return None


def missing_state(folder: Path, fresh_optimizer: bool = False) -> str | None:
    """Returns what a readable checkpoint lacks to continue its run exactly, or None."""
    if not (folder / RECORD_NAME).is_file():
        return (
            f"it has no {RECORD_NAME}, so nothing says with which data and arguments it was trained; start a new run "
            "from its weights with --model_name_or_path"
        )
    if fresh_optimizer:
        return None
    processes = read_record(folder)["arguments"]["processes"]
    generators = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    missing = [] if any(any(folder.glob(pattern)) for pattern in OPTIMIZERS) else ["optimizer"]
    missing += [name for name in (SCHEDULER_NAME, *generators) if not (folder / name).is_file()]
    return FRESH_OPTIMIZER.format(missing=" and no ".join(missing)) if missing else None


def _read(path: Path) -> None:
    """Raises an error if a file is truncated or damaged. Pickles are read restricted, so that they run no code."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        if path.name == TRAINER_STATE_NAME and not isinstance(content.get("global_step"), int):
            raise ValueError("it does not say the step")
        if path.name == SAFE_WEIGHTS_INDEX_NAME:
            for name, shard in content["weight_map"].items():
                with safe_open(path.parent / shard, "pt") as weights:
                    weights.get_slice(name)
    elif path.suffix == ".safetensors":
        # Opening compares the header with the size of the file.
        with safe_open(path, "pt"):
            pass
    elif path.suffix in {".pt", ".pth"}:
        # The archive has a checksum for each member.
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        if path.parent.name.startswith("global_step"):
            # DeepSpeed writes objects of its own classes there, which the restricted reading refuses.
            return
        with safe_globals():
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
