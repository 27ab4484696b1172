"""The identity of a training run: its arguments, model and data. Every checkpoint holds it.

A resumed run must end with the same weights as one that never stopped. So everything that decides the weights must be
unchanged. `refuse_changes` compares a new record with the one in the checkpoint, and names what differs.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel, TrainingArguments

from ..errors import UserError
from .mixture import Mixture
from .token_store import TokenBlocks

logger = logging.getLogger(__name__)

RECORD_NAME = "training_run.json"

# Arguments that do not decide the weights: where a run writes; what it measures, reports, keeps and uploads; how fast
# it works; and paths, because data are compared by content. All other arguments are compared, so an argument that a
# later version of Transformers adds is compared too.
FREE_PREFIXES = ("eval_", "log", "save_", "hub_", "push_to_hub", "trackio_")
FREE = {
    "output_dir", "run_name", "project", "report_to", "disable_tqdm", "resume_from_checkpoint", "local_rank",
    "do_train", "do_eval", "do_predict", "per_device_eval_batch_size", "prediction_loss_only", "bf16_full_eval",
    "fp16_full_eval", "include_for_metrics", "batch_eval_metrics", "include_num_input_tokens_seen", "debug",
    "skip_memory_metrics", "torch_empty_cache_steps", "enable_jit_checkpoint", "ddp_timeout",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "train_file", "validation_file", "dataset_name", "prepared_data", "preprocessing_num_workers",
    "max_eval_samples", "fresh_optimizer", "profile_steps",
}  # fmt: skip

# Arguments of later releases, with the value that earlier runs had. They are recorded only if they differ from it.
ADDED_LATER = {
    "context_parallel_size": 1, "tensor_parallel_size": 1,
    "early_stopping_patience": None, "early_stopping_threshold": 0.0,
}  # fmt: skip

# The length of a run. It decides the learning rate of every step, unless the rate is constant.
LENGTH = {"max_steps", "num_train_epochs"}

# Fields of the config that do not change the model. Trainer takes those of tokens from the tokenizer when it begins.
NOT_THE_MODEL = {
    "transformers_version", "use_cache", "_name_or_path", "architectures", "auto_map",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


# Variables in which `accelerate launch` passes how processes share the work.
RANKS_OF_ACCELERATE = ("PARALLELISM_CONFIG_TP_SIZE", "PARALLELISM_CONFIG_CP_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")


def run_arguments(args: TrainingArguments, others: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that decide the weights.

    Args:
        args: Trainer's own.
        others: Those of the command, by name.

    Returns:
        The arguments, the number of processes, and the number and kind of their devices.
    """
    given = {name: value for name, value in others.items() if ADDED_LATER.get(name, ...) != value}
    arguments = {name: value for name, value in {**given, **args.to_dict()}.items() if not _is_free(name)}
    if accelerate_sizes := {
        name: os.environ[name] for name in RANKS_OF_ACCELERATE if os.environ.get(name, "1") != "1"
    }:
        arguments["ranks"] = accelerate_sizes
    arguments |= {"processes": args.world_size, "devices": max(1, args.n_gpu), "device": args.device.type}
    return _as_json(arguments)


def _is_free(name: str) -> bool:
    return name in FREE or name.startswith(FREE_PREFIXES)


def run_model(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the fields of the model's config, its attention backend, and the dtype of its weights."""
    fields = {name: value for name, value in model.config.to_dict().items() if name not in NOT_THE_MODEL}
    return _as_json(
        fields | {"attn_implementation": model.config._attn_implementation, "dtype": str(model.dtype).split(".")[-1]}
    )


def data_digest(blocks: Dataset | TokenBlocks | Mixture) -> str:
    """Returns the SHA-256 of all blocks in order."""
    digest = hashlib.sha256()
    if isinstance(blocks, TokenBlocks):
        return blocks.digest()
    if isinstance(blocks, Mixture):
        parts = [data_digest(part) for part in blocks.parts]
        return hashlib.sha256(json.dumps([parts, blocks.weights, blocks.seed]).encode()).hexdigest()
    for table in blocks.with_format("arrow").iter(batch_size=1000):
        for name in sorted(table.column_names):
            column = table[name].combine_chunks()
            digest.update(f"{name} {len(column)} ".encode())
            for values in (column.value_lengths(), column.flatten()):
                digest.update(f"{values.type} ".encode())
                digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Returns the versions of the libraries whose arithmetic affects the result."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def read_record(checkpoint: str | Path) -> dict[str, Any]:
    """Returns the record in a checkpoint."""
    return json.loads((Path(checkpoint) / RECORD_NAME).read_text())


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `record` to the checkpoint `folder`, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def refuse_changes(checkpoint: str | Path, **sections: Any) -> None:
    """Raises `UserError` if a section of the record differs from the one in `checkpoint`.

    The length of the run may differ if its learning rate is constant. Other versions of torch or Transformers only
    cause a warning, because they may round differently.

    Args:
        checkpoint: Folder of the checkpoint to resume from.
        sections: `arguments`, `model` and `data` of the resumed run.
    """
    earlier = read_record(checkpoint)
    differences = []
    for section, new in sections.items():
        old = earlier[section]
        if section == "data":
            differences += ["its training data"] if new != old else []
            continue
        allowed = NOT_THE_MODEL if section == "model" else LENGTH if _has_constant_rate(old) else set()
        differences += [
            f"{name} ({json.dumps(new.get(name))}, not {json.dumps(old.get(name))})"
            for name in sorted(old.keys() | new.keys())
            if new.get(name) != old.get(name) and name not in allowed
        ]
    if differences:
        raise UserError(
            f"{checkpoint} belongs to another run, which differs in {', '.join(differences)}: resume with the same "
            "values, or start a new run from its weights with --model_name_or_path"
        )
    for library, version in versions().items():
        if version != earlier["versions"].get(library):
            logger.warning(
                "%s was written with %s %s, and this is %s: the last bits of the weights may differ from those of an "
                "uninterrupted run",
                checkpoint, library, earlier["versions"].get(library), version,
            )  # fmt: skip


def _has_constant_rate(arguments: Mapping[str, Any]) -> bool:
    """Returns whether the learning rate of a step does not depend on the length of the run.

    A warmup below 1 is a fraction of the run, so it depends on the length.
    """
    schedule, warmup = arguments.get("lr_scheduler_type"), arguments.get("warmup_steps") or 0
    return schedule == "constant" or (schedule == "constant_with_warmup" and not 0 < warmup < 1)


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` as they are after writing and reading JSON."""
    return json.loads(json.dumps(values, default=str))
