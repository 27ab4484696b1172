"""Says what training a model would take: parameters, memory, operations, time, and the KV cache.

    hf_alibi plan runs/books --gpus 8 --gpu h100 --bf16 --per_device_train_batch_size 16 --block_size 2048

CONFIG is a folder or file with a config.json, a Hub id, or the TOML file of a study, whose [model] is taken. No
weights are loaded and nothing is trained. docs/planning.md says how the numbers are found, and how they compare with
measured ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten

import torch
from transformers import AutoConfig, PreTrainedConfig

from ..errors import UserError
from ..hub.checkpoints import LOADING_ERRORS, parse_overrides
from ..model.configuration_alibi_gpt import AlibiGPTConfig
from ..planning.gpus import GPU, GPUS
from ..planning.memory import OPTIMIZERS, Setup
from ..planning.report import Run, report
from ..study.plan import load_plan
from ..study.training import new_config
from .options import OptionParser, in_range, parse


@dataclass
class PlanArguments:
    """How the model is trained, and on what."""

    gpu: str = field(default="h100", metadata={"help": "The GPU.", "choices": [*GPUS]})
    gpus: int = field(default=1, metadata={"help": "How many; each is one rank of data parallelism."})
    peak_tflops: float | None = field(
        default=None, metadata={"help": "Peak speed of the GPU in the run's precision, in place of the table's."}
    )
    memory_gb: float | None = field(
        default=None, metadata={"help": "Memory of the GPU in 10^9 bytes, in place of the table's."}
    )
    utilisation: float = field(default=0.4, metadata={"help": "Part of the peak speed that training reaches."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens in a block; default: the training length of the config."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Blocks in a forward pass of one rank."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes of a step."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Count time with it; memory is always told with and without."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the weights.", "choices": ["float32", "bfloat16", "float16"]},
    )
    bf16: bool = field(default=False, metadata={"help": "Mixed precision in bfloat16."})
    fp16: bool = field(default=False, metadata={"help": "Mixed precision in float16."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimizer.", "choices": [*OPTIMIZERS]})
    sharding_stage: int = field(
        default=0,
        metadata={
            "help": "What ranks share: 0 nothing (DDP), 1 the optimizer (ZeRO-1), 2 also gradients (ZeRO-2, FSDP "
            "SHARD_GRAD_OP), 3 also weights (ZeRO-3, FSDP FULL_SHARD).",
            "choices": [0, 1, 2, 3],
        },
    )
    tokens: int | None = field(default=None, metadata={"help": "Tokens of the whole run, for its days."})
    config_overrides: str = field(
        default="", metadata={"help": "Fields of the config to change, such as num_hidden_layers=32,vocab_size=50304."}
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the report that the command line `argv` (default: the process's own) asks for."""
    parser = OptionParser([PlanArguments], description=__doc__.partition("\n")[0])
    parser.add_argument("config", help="Folder or config.json of a model, Hub id, or TOML file of a study.")
    arguments, named = parse(parser, argv)
    check(arguments)
    config = read_config(named.config, arguments.config_overrides)
    run = asked_run(arguments, config)
    if run.setup.length > config.max_position_embeddings:
        raise UserError(
            f"--block_size {run.setup.length} exceeds the {config.max_position_embeddings} positions of the model"
        )
    print(report(config, run))


def check(arguments: PlanArguments) -> None:
    """Raises `UserError` for numbers that are impossible, and for options that exclude each other."""
    in_range(arguments, 1, "gpus", "per_device_train_batch_size", "gradient_accumulation_steps", "tokens")
    in_range(arguments, 3, "block_size")
    for name in ("utilisation", "peak_tflops", "memory_gb"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < (1.0 + 1e-9 if name == "utilisation" else 1e9):
            raise UserError(f"--{name} must be above 0{', at most 1' * (name == 'utilisation')}, got {value}")
    if arguments.bf16 and arguments.fp16:
        raise UserError("give either --bf16 or --fp16, not both")
    if (arguments.bf16 or arguments.fp16) and arguments.dtype != "float32":
        raise UserError(f"mixed precision keeps weights in float32, but --dtype is {arguments.dtype}; leave one out")
    if arguments.sharding_stage and arguments.gpus == 1:
        raise UserError(f"--sharding_stage {arguments.sharding_stage} needs --gpus 2 or more: one rank shares nothing")


def read_config(name: str, overrides: str) -> PreTrainedConfig:
    """Returns the config that the command names. Raises `UserError` if it cannot be read, or is no AlibiGPT."""
    if name.endswith(".toml"):
        plan = load_plan(Path(name))
        length = max(plan.training.lengths)
        config = new_config({"model_type": "alibi_gpt", "training_length": length} | plan.model)
    else:
        try:
            config = AutoConfig.from_pretrained(name)
        except LOADING_ERRORS as error:
            raise UserError(f"cannot read the config of {name}: {shorten(str(error), 300)}") from error
    if not isinstance(config, AlibiGPTConfig):
        raise UserError(f"{name} is a {config.model_type!r} model; plan knows alibi_gpt and its relatives only")
    if not overrides:
        return config
    fields = config.to_dict() | parse_overrides(overrides, config)
    # Sizes that follow from others are found anew, unless they are given.
    return new_config({key: value for key, value in fields.items() if key not in _derived(config, overrides)})


def _derived(config: PreTrainedConfig, overrides: str) -> set[str]:
    """Returns the fields whose values are those that follow from other fields, and that are not overridden."""
    given = parse_overrides(overrides, config)
    follows = {
        "head_dim": config.hidden_size // config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "intermediate_size": 4 * config.hidden_size,
    }
    return {name for name, value in follows.items() if name not in given and getattr(config, name) == value}


def asked_run(arguments: PlanArguments, config: PreTrainedConfig) -> Run:
    """Returns the run that the arguments describe."""
    autocast = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    setup = Setup(
        batch=arguments.per_device_train_batch_size,
        length=arguments.block_size or config.training_length,
        ranks=arguments.gpus,
        accumulation=arguments.gradient_accumulation_steps,
        checkpointing=arguments.gradient_checkpointing,
        dtype=getattr(torch, arguments.dtype),
        autocast=autocast,
        optimizer=arguments.optim,
        stage=arguments.sharding_stage,
    )
    return Run(setup, _gpu(arguments), arguments.utilisation, arguments.tokens)


def _gpu(arguments: PlanArguments) -> GPU:
    gpu = GPUS[arguments.gpu]
    if arguments.peak_tflops is None and arguments.memory_gb is None:
        return gpu
    tflops = arguments.peak_tflops
    return GPU(
        f"{gpu.name}, changed",
        tflops or gpu.tflops_16,
        tflops or gpu.tflops_32,
        arguments.memory_gb or gpu.memory_gb,
        "the command line",
    )
