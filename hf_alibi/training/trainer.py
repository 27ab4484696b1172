"""Trains a causal language model on blocks of tokens with `transformers.Trainer`, and resumes interrupted runs.

With `hf_alibi.training.data` and `packing`, a few lines train a model:

    corpus = standard_library_corpus()
    tokenizer = train_tokenizer(corpus["train"]["text"], vocab_size=4096)
    blocks = pack(corpus, tokenizer, block_size=256)
    model = AlibiGPTForCausalLM(AlibiGPTConfig(vocab_size=len(tokenizer), training_length=256))
    metrics = train(model, tokenizer, blocks, TrainingArguments("runs/first", max_steps=500))
    print(metrics["eval_perplexity"])

`train(..., checkpoint=find_checkpoint(args))` continues a run that was killed from its last checkpoint. It ends with
the weights of an uninterrupted run: the checkpoint holds the optimizer and the state of every random number generator,
and the seed decides the order of the blocks. If the data, the model or an argument that decides the weights has
changed, an error is raised.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from ..errors import UserError
from ..evaluation.perplexity import trainer_metrics
from ..hub.checkpoints import check_vocabulary
from ..hub.publish import publish
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM
from .packing import collate_blocks
from .run_record import data_digest, read_record, refuse_changes, run_arguments, run_model
from .safe_trainer import SafeTrainer
from .stream import EndlessStream


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Mapping[str, Any],
    args: TrainingArguments,
    checkpoint: str | None = None,
    *,
    fresh_optimizer: bool = False,
    context_parallel_size: int = 1,
    arguments: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Trains `model` on `blocks["train"]`, saves it with its tokenizer, and evaluates it on `blocks["validation"]`.

    With `args.push_to_hub`, the model is uploaded at each checkpoint, as `args.hub_strategy` says, and published with
    its card at the end. Uploads hold only the model's files, and neither pickles nor tokens; see `SafeTrainer`.

    Args:
        model: Any causal language model.
        tokenizer: Of the model.
        blocks: A corpus after `hf_alibi.training.packing.pack`, or what `load_prepared` returns. `train` may also be
            a `Mixture` or an `EndlessStream`. The split `validation` is optional.
        args: Trainer's arguments.
        checkpoint: Folder of a checkpoint to continue from; see `hf_alibi.training.resume.find_checkpoint`.
        fresh_optimizer: Whether to continue from the weights of `checkpoint` with a new optimizer, at the learning
            rate of its step. The weights will then differ from those of an uninterrupted run.
        context_parallel_size: Number of processes among which every row is divided.
        arguments: Further arguments that decide the weights, by name. Those of `checkpoint` must be equal.
        callbacks: Further callbacks of Trainer.

    Returns:
        The metrics of training (`train_loss` in nats per token, ...) and of evaluation (`eval_loss`,
        `eval_perplexity` per token, `eval_bits_per_byte`, ...). They are printed, and written to
        `train_results.json`, `eval_results.json` and `all_results.json` in `args.output_dir`.

    Raises:
        UserError: If the tokenizer has more tokens than the model, `Trainer` refuses `args`, `checkpoint` belongs to
            another run, or the model cannot be published.
    """
    check_vocabulary(tokenizer, model.config)
    if args.push_to_hub and type(model).__name__ != AlibiGPTForCausalLM.__name__:
        raise UserError(f"push_to_hub: only AlibiGPTForCausalLM can be published, not {type(model).__name__}")
    if not torch.accelerator.is_available():
        # Pinned memory is useless without an accelerator, and torch warns about it.
        args.dataloader_pin_memory = False
    smoothing = args.label_smoothing_factor
    record: dict[str, Any] = {"arguments": run_arguments(args, arguments or {}), "model": run_model(model)}
    train_blocks = blocks["train"]
    if isinstance(train_blocks, IterableDataset):
        train_blocks = EndlessStream([train_blocks], args.seed)
    if isinstance(train_blocks, EndlessStream):
        train_blocks.check_workers(args.dataloader_num_workers)
    else:
        record["data"] = data_digest(train_blocks)
    if checkpoint:
        refuse_changes(checkpoint, **record)
        if isinstance(train_blocks, EndlessStream):
            train_blocks.expect(read_record(checkpoint)["data"])
    try:
        trainer = SafeTrainer(
            model=model,
            args=args,
            train_dataset=train_blocks,
            eval_dataset=blocks.get("validation"),
            data_collator=collate_blocks,
            processing_class=tokenizer,
            # By default, Trainer does not shift the labels of a compiled model.
            compute_loss_func=partial(LabelSmoother(smoothing), shift_labels=True) if smoothing else None,
            record=record,
            fresh_optimizer=fresh_optimizer,
            context_parallel_size=context_parallel_size,
            callbacks=list(callbacks),
            **trainer_metrics(tokenizer),
        )
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        # Trainer's arguments contradict each other, or name something that does not exist.
        raise UserError(str(error)) from error
    if isinstance(train_blocks, EndlessStream):
        train_blocks.blocks_per_step = trainer.get_total_train_batch_size(args)
    metrics = {"train": trainer.train(resume_from_checkpoint=checkpoint).metrics}
    # `_internal_call` keeps Trainer from uploading here: `publish` does so below, and verifies the upload.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    model.config.use_cache = True
    if "validation" in blocks:
        metrics["eval"] = trainer.evaluate()
    for split, values in metrics.items():
        trainer.log_metrics(split, values)
        trainer.save_metrics(split, values)
    if args.push_to_hub and trainer.is_world_process_zero():
        publish(
            str(args.output_dir),
            str(trainer.hub_model_id),
            private=bool(args.hub_private_repo),
            revision=args.hub_revision,
            token=args.hub_token,
        )
    return {name: value for values in metrics.values() for name, value in values.items()}
