r"""Trains a causal language model on text, from scratch or from a checkpoint, with Trainer's arguments and some more.

By default the text is the source code of Python's standard library, which needs no network:

    hf_alibi train --output_dir runs/first --block_size 256 --max_steps 500 \
        --config_overrides "hidden_size=192,num_hidden_layers=3,num_attention_heads=6" --vocab_size 4096

To resume a run that was stopped (by kill -9, for example), repeat its command with --resume_from_checkpoint True. It
ends with the weights of an uninterrupted run. If anything that decides the weights has changed, an error is raised.
What is saved, measured, reported and uploaded may change, and so may --max_steps if --lr_scheduler_type is constant.

`accelerate launch -m hf_alibi train ...` starts several processes. The output folder gets the model, its tokenizer,
train_results.json, eval_results.json (with the perplexity), all_results.json and trainer_state.json.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from datasets import concatenate_datasets
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import UserError
from ..hub.checkpoints import LOADING_ERRORS, check_vocabulary, load_causal_lm, load_tokenizer, parse_overrides
from ..training.data import Corpus, documents_in_turn, reading_errors, train_tokenizer
from ..training.mixture import Mixture
from ..training.monitor import no_bars_in_files
from ..training.packing import pack
from ..training.prepare import load_prepared
from ..training.processes import end_together
from ..training.resume import find_checkpoint
from ..training.run_record import refuse_changes, run_arguments
from ..training.stream import EndlessStream
from ..training.tensor_parallel import divide_heads
from ..training.token_store import TokenBlocks
from ..training.trainer import train
from .options import OptionParser, in_range, parse
from .texts import TextArguments, check_weights, load_corpora
from .watching_options import WatchingArguments, check_watching

# Trainer does not check its numbers. These must be at least 1, at least 0, and from 0 to 1.
COUNTS = (
    "eval_accumulation_steps",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "save_total_limit",
)
AMOUNTS = (
    "adam_epsilon",
    "dataloader_num_workers",
    "eval_delay",
    "eval_steps",
    "learning_rate",
    "logging_steps",
    "max_grad_norm",
    "neftune_noise_alpha",
    "num_train_epochs",
    "save_steps",
    "warmup_steps",
    "weight_decay",
)
FRACTIONS = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
# Options about texts, which prepared data are no longer.
NOT_FOR_PREPARED = (
    "dataset_name", "dataset_config_name", "train_file", "validation_file", "streaming", "preprocessing_num_workers",
)  # fmt: skip
# Excludes infinity, and no useful number.
MOST = 1e30


@dataclass
class ModelArguments:
    """Which model to train, and with which tokenizer."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from, a folder or Hub id; default: new weights."}
    )
    model_type: str = field(
        default="alibi_gpt",
        metadata={
            "help": "Architecture: alibi_gpt, or the same with other positions: fox_gpt, hype_gpt, "
            "kerple_gpt, learned_gpt, nope_gpt, rotary_gpt, sinusoidal_gpt, t5_gpt."
        },
    )
    config_overrides: str = field(
        default="",
        metadata={"help": "Fields of the new model's config, such as hidden_size=192,alibi_slopes=[0.5,0.25]."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer, a folder or Hub id; default: the checkpoint's, or a new byte-level BPE."},
    )
    vocab_size: int = field(default=8192, metadata={"help": "Entries of a new tokenizer."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Dtype of the weights; for mixed precision keep float32 and give --bf16.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention backend, e.g. sdpa or eager; default: the model's own choice."}
    )
    context_parallel_size: int = field(
        default=1, metadata={"help": "Processes among which every block is divided, for long blocks."}
    )
    tensor_parallel_size: int = field(
        default=1, metadata={"help": "Processes among which heads are divided; more processes use FSDP2."}
    )
    fresh_optimizer: bool = field(
        default=False,
        metadata={"help": "Resume only from a checkpoint's weights, with a new optimizer; not bit for bit."},
    )


@dataclass
class DataArguments(TextArguments):
    """Which texts to train on, and how to cut them into blocks."""

    prepared_data: list[Path] | None = field(
        default=None,
        metadata={"help": "Folders of hf_alibi prepare, instead of texts; several with --train_weights."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; needs --max_steps."})
    block_size: int = field(default=512, metadata={"help": "Tokens in a block: the training length."})
    isolate_documents: bool = field(
        default=False, metadata={"help": "Keep attention within documents; default: it crosses their borders."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Most blocks to train on."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Most blocks to evaluate on."})


@reading_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line `argv` (default: the process's own) says."""
    parser = OptionParser(
        [ModelArguments, DataArguments, WatchingArguments, TrainingArguments],
        description=__doc__.partition("\n")[0],
        usage="%(prog)s --output_dir FOLDER [options]",
    )
    model_args, data_args, watching_args, training_args = parse(parser, argv)
    check(model_args, data_args, training_args)
    check_watching(watching_args, training_args)
    no_bars_in_files()
    arguments = asdict(model_args) | asdict(data_args) | asdict(watching_args)
    checkpoint = find_checkpoint(training_args, model_args.fresh_optimizer)
    if checkpoint and model_args.tensor_parallel_size > 1:
        raise UserError(
            "--tensor_parallel_size: Transformers cannot continue a run whose heads are divided; start a new one "
            f"from its weights with --model_name_or_path {checkpoint}"
        )
    if checkpoint:
        refuse_changes(checkpoint, arguments=run_arguments(training_args, arguments))
    start = checkpoint or model_args.model_name_or_path
    with training_args.main_process_first(desc="data and tokenizer"):
        corpora = [] if data_args.prepared_data else load_corpora(data_args, data_args.streaming)
        if start:
            tokenizer = load_tokenizer(model_args.tokenizer_name or start)
        else:
            if data_args.prepared_data and not model_args.tokenizer_name:
                model_args.tokenizer_name = str(data_args.prepared_data[0])
            tokenizer = new_tokenizer(model_args, documents_in_turn(corpora))
    set_seed(training_args.seed)
    # All processes at once: with ZeRO-3, each creates a part of the model.
    if start:
        model = load_model(model_args, start, tokenizer)
    else:
        model = new_model(model_args, tokenizer, data_args.block_size)
    try_out(model, training_args)
    with training_args.main_process_first(desc="blocks"):
        blocks = load_blocks(data_args, corpora, tokenizer, training_args.seed)
    if model_args.tensor_parallel_size > 1:
        model = divide_heads(model, training_args, model_args.tensor_parallel_size)
    train(
        model,
        tokenizer,
        blocks,
        training_args,
        checkpoint,
        fresh_optimizer=model_args.fresh_optimizer,
        context_parallel_size=model_args.context_parallel_size,
        arguments=arguments,
        callbacks=watching_args.callbacks(),
    )
    end_together()


def check(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Raises `UserError` for options that exclude each other, or that would fail only during or after training."""
    if data_args.prepared_data:
        if given := [name for name in NOT_FOR_PREPARED if getattr(data_args, name)]:
            raise UserError(f"--prepared_data is tokenised and split already: leave out --{' and --'.join(given)}")
        check_weights(data_args.train_weights, [str(path) for path in data_args.prepared_data])
        if len(data_args.prepared_data) > 1 and not data_args.train_weights:
            raise UserError("several --prepared_data need --train_weights, one number for each")
    else:
        data_args.check()
    if data_args.streaming and not (data_args.dataset_name or data_args.train_file):
        raise UserError("--streaming needs --dataset_name or --train_file: the default text is small")
    if data_args.streaming and training_args.max_steps <= 0:
        raise UserError("--streaming needs --max_steps: the length of the data is not known in advance")
    if data_args.streaming and data_args.preprocessing_num_workers:
        raise UserError(
            "--preprocessing_num_workers has no effect with --streaming, which tokenises while training: use "
            "--dataloader_num_workers, or hf_alibi prepare"
        )
    if data_args.train_weights and data_args.max_train_samples:
        raise UserError("--max_train_samples limits one data set: leave it out with --train_weights")
    in_range(data_args, 3, "block_size")
    in_range(data_args, 1, "max_train_samples", "max_eval_samples")
    in_range(model_args, 1, "vocab_size", "context_parallel_size", "tensor_parallel_size")
    in_range(training_args, 1, *COUNTS)
    in_range(training_args, 0, *AMOUNTS, highest=MOST)
    in_range(training_args, 0, *FRACTIONS, highest=1)
    in_range(training_args, 0, "seed", "data_seed", highest=2**32 - 1)
    if not training_args.eval_do_concat_batches or training_args.batch_eval_metrics:
        raise UserError("the perplexity needs --eval_do_concat_batches True and --batch_eval_metrics False")
    if training_args.label_names not in (None, ["labels"]):
        raise UserError(f"--label_names: the labels are called labels here, not {training_args.label_names}")
    if training_args.dataloader_persistent_workers and not training_args.dataloader_num_workers:
        raise UserError("--dataloader_persistent_workers needs --dataloader_num_workers")
    if training_args.use_liger_kernel and training_args.label_smoothing_factor:
        raise UserError("--label_smoothing_factor needs logits, which --use_liger_kernel avoids: leave one out")
    if training_args.use_liger_kernel and (find_spec("liger_kernel") is None or training_args.device.type == "cpu"):
        raise UserError("--use_liger_kernel needs a GPU, and the package: pip install liger-kernel")
    if isinstance(training_args.lr_scheduler_kwargs, str):
        raise UserError(f"--lr_scheduler_kwargs must be a JSON object, got {training_args.lr_scheduler_kwargs!r}")
    if training_args.torch_compile:
        try:
            torch.compile(
                torch.nn.Identity(),
                backend=str(training_args.torch_compile_backend),
                mode=training_args.torch_compile_mode,
            )
        except RuntimeError as error:
            raise UserError(f"--torch_compile: {shorten(str(error), 300)}") from error


def try_out(model: PreTrainedModel, training_args: TrainingArguments) -> None:
    """Checks that there is an optimizer, and for training on the CPU that the loss is finite and has gradients.

    The model is still on the CPU, so other devices are not tried, and with ZeRO-3 it is in parts. Weights and random
    numbers are unchanged afterwards.

    Raises:
        UserError: If the optimizer needs another package or has bad arguments, if the attention has no backward pass
            on the CPU, or if the weights are damaged.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(training_args, model)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(
            f"--optim {getattr(training_args.optim, 'value', training_args.optim)}: {shorten(str(error), 300)}"
        ) from error
    if training_args.device.type != "cpu" or is_deepspeed_zero3_enabled():
        return
    input_ids = torch.arange(3)[None] % model.config.vocab_size
    with torch.random.fork_rng(devices=[]):
        try:
            loss = model(input_ids=input_ids, labels=input_ids).loss
            loss.backward()
        except (NotImplementedError, ValueError, RuntimeError) as error:
            raise UserError(f"the model cannot be trained on the CPU: {shorten(str(error), 300)}") from error
    model.zero_grad()
    if not loss.isfinite():
        raise UserError(f"the loss before training is {loss.item()}: the initial weights are damaged or too large")


def load_blocks(
    arguments: DataArguments, corpora: Sequence[Corpus], tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, Any]:
    """Returns the blocks to train on and, if there are any, those to evaluate on."""
    cut = (arguments.block_size, arguments.isolate_documents)
    if arguments.prepared_data:
        packed: list[Mapping[str, Any]] = [load_prepared(path, tokenizer, *cut) for path in arguments.prepared_data]
    else:
        packed = [pack(corpus, tokenizer, *cut, arguments.preprocessing_num_workers) for corpus in corpora]
    blocks = {"train": [each["train"] for each in packed]}
    blocks |= {"validation": [each["validation"] for each in packed if "validation" in each]}
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    joined: dict[str, Any] = {"validation": joined_blocks(blocks["validation"], limits["validation"])}
    if arguments.train_weights is None:
        joined["train"] = joined_blocks(blocks["train"], limits["train"])
    elif arguments.streaming:
        joined["train"] = EndlessStream(blocks["train"], seed, arguments.train_weights)
    else:
        joined["train"] = Mixture(blocks["train"], arguments.train_weights, seed)
    return {split: part for split, part in joined.items() if part is not None}


def joined_blocks(parts: Sequence[Any], limit: int | None) -> Any:
    """Returns these data sets one after another, at most `limit` blocks in all. None if there is no data set."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0] if limit is None else parts[0].take(limit)
    if isinstance(parts[0], TokenBlocks):
        joined: Any = torch.utils.data.ConcatDataset(parts)
        return joined if limit is None else torch.utils.data.Subset(joined, range(min(limit, len(joined))))
    joined = concatenate_datasets(list(parts))
    return joined if limit is None else joined.take(limit)


def load_model(arguments: ModelArguments, path: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Returns the model of the checkpoint `path`.

    Raises:
        UserError: If the tokenizer or the arguments do not fit it.
    """
    model, _ = load_causal_lm(
        path,
        dtype=arguments.dtype,
        device="cpu",
        attn_implementation=arguments.attn_implementation,
        model_types=[arguments.model_type],
    )
    for name, value in parse_overrides(arguments.config_overrides, model.config).items():
        if getattr(model.config, name) != value:
            raise UserError(
                f"--config_overrides: {name} is {getattr(model.config, name)} in {path} and cannot be changed"
            )
    check_vocabulary(tokenizer, model.config)
    return model


def new_tokenizer(arguments: ModelArguments, documents: Iterable[str]) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that the arguments name, or one that is trained on `documents`."""
    if arguments.tokenizer_name:
        return load_tokenizer(arguments.tokenizer_name)
    return train_tokenizer(documents, arguments.vocab_size)


def new_model(arguments: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedModel:
    """Returns a model with new weights for the tokenizer."""
    overrides = parse_overrides(arguments.config_overrides, new_config(arguments.model_type, {}))
    values = {
        "vocab_size": len(tokenizer),
        "training_length": block_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = new_config(arguments.model_type, values | overrides)
    check_vocabulary(tokenizer, config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, name)
        if token is not None and not (isinstance(token, int) and 0 <= token < config.vocab_size):
            raise UserError(f"--config_overrides: the model has {config.vocab_size} tokens, but no {name} {token}")
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype=arguments.dtype, attn_implementation=arguments.attn_implementation
        )
    except LOADING_ERRORS as error:
        raise UserError(shorten(str(error), 300)) from error


def new_config(model_type: str, values: dict[str, Any]) -> PreTrainedConfig:
    """Returns a config of this type. Raises `UserError` for values that it refuses."""
    try:
        return AutoConfig.for_model(model_type, **values)
    except LOADING_ERRORS as error:
        raise UserError(shorten(str(error), 300)) from error
