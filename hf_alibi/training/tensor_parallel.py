"""Tensor parallelism in training: ranks that share the heads of a model, and FSDP2 among groups of them.

    hf_alibi train ... --tensor_parallel_size 2      # under torchrun or accelerate launch

Groups of `size` ranks get the same batches, and each rank of a group computes some of the heads. If there are several
groups, they also share weights, gradients and the optimizer's states (FSDP2). Transformers does both while it loads a
model (`DistributedConfig`), so a model is saved first.

Transformers cannot save the optimizer of such a model, so a run cannot be resumed.
"""

import shutil
from pathlib import Path

import torch.distributed as dist
from transformers import DistributedConfig, PreTrainedModel, TrainingArguments

from ..errors import UserError
from .safe_trainer import asks_for_fsdp


def divide_heads(model: PreTrainedModel, args: TrainingArguments, size: int) -> PreTrainedModel:
    """Returns `model` with its heads divided among groups of `size` ranks. All ranks must call this.

    Args:
        model: Whole, and the same on every rank.
        args: Trainer's arguments. The weights are in a folder of `args.output_dir` for a moment.
        size: Number of ranks in a group.

    Raises:
        UserError: If `size` does not divide the number of processes or of heads, or something else divides the model.
    """
    ranks = args.world_size
    if ranks % size or ranks == 1:
        raise UserError(f"--tensor_parallel_size {size} does not divide the {ranks} processes")
    if asks_for_fsdp(args) or args.deepspeed:
        raise UserError(
            "--tensor_parallel_size divides the model itself, by FSDP2 too, so leave out FSDP and DeepSpeed: start "
            "the processes with torchrun, or with a config as scripts/accelerate/tensor_parallel.yaml"
        )
    # The first rank of each machine writes, because machines may or may not share their disks.
    folder = Path(str(args.output_dir)) / f"weights-to-divide-{args.process_index - args.local_process_index}"
    if args.local_process_index == 0:
        model.save_pretrained(folder)
    dist.barrier()
    try:
        return type(model).from_pretrained(
            folder,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            distributed_config=DistributedConfig(tp_size=size, fsdp_size=ranks // size),
        )
    except ValueError as error:
        raise UserError(f"--tensor_parallel_size {size}: {error}") from error
    finally:
        dist.barrier()
        if args.local_process_index == 0:
            shutil.rmtree(folder)
