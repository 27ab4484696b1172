"""Train a causal language model on blocks of tokens with `transformers.Trainer`, and go on after an interruption.

With `hf_alibi.training.data`, a model is trained in a few lines::

    corpus = standard_library_corpus()
    tokenizer = train_tokenizer(corpus["train"]["text"], vocab_size=4096)
    blocks = pack(corpus, tokenizer, block_size=256)
    model = AlibiGPTForCausalLM(AlibiGPTConfig(vocab_size=len(tokenizer), training_length=256))
    metrics = train(model, tokenizer, blocks, TrainingArguments("runs/first", max_steps=500))
    print(metrics["eval_perplexity"])

A run that was killed continues from its last checkpoint with ``train(..., checkpoint=find_checkpoint(args))``, and
ends with the weights that it would have had: the checkpoint holds the optimizer and the state of every random number
generator, and the order of the blocks follows from the seed. If the data, the model or an argument that decides the
weights is not what it was, the run is refused.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from datasets import DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from ..errors import UserError
from ..evaluation.perplexity import trainer_metrics
from ..hub.checkpoints import check_vocabulary
from ..hub.publish import publish
from ..model.modeling_alibi_gpt import AlibiGPTForCausalLM
from .data import collate_blocks
from .run_record import data_digest, read_record, refuse_changes, run_arguments, run_model
from .safe_trainer import SafeTrainer
from .stream import EndlessStream


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: DatasetDict | IterableDatasetDict,
    args: TrainingArguments,
    checkpoint: str | None = None,
    *,
    fresh_optimizer: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Train `model` on ``blocks["train"]``, save it with its tokenizer, and evaluate it on ``blocks["validation"]``.

    With ``args.push_to_hub``, the model is uploaded at each checkpoint, as ``args.hub_strategy`` says, and in the end
    published with its card. No upload holds any other file, a pickle or a token; see `SafeTrainer`.

    Args:
        blocks: what `hf_alibi.training.data.pack` makes of a corpus. A split ``validation`` is optional.
        checkpoint: folder of a checkpoint to continue from; see `hf_alibi.training.resume.find_checkpoint`.
        fresh_optimizer: continue from the weights of `checkpoint` with a new optimizer, at the learning rate of its
            step. The weights will not be those of a run without an interruption.
        arguments: what else made the run, by name; `checkpoint` must have been written with the same.

    Returns:
        The metrics of training (``train_loss`` in nats per token, ...) and of evaluation (``eval_loss``,
        ``eval_perplexity`` per token, ``eval_bits_per_byte``, ...). They are printed, and in `args.output_dir` in
        ``train_results.json``, ``eval_results.json`` and ``all_results.json``, beside ``trainer_state.json``.

    Raises:
        UserError: the tokenizer has more tokens than the model, `Trainer` cannot work with `args`, `checkpoint` is of
            another run, or the model cannot be published.
    """
    check_vocabulary(tokenizer, model.config)
    if args.push_to_hub and type(model).__name__ != AlibiGPTForCausalLM.__name__:
        raise UserError(f"push_to_hub: only AlibiGPTForCausalLM can be published, not {type(model).__name__}")
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False  # it is of no use then, and torch warns of it
    smoothing = args.label_smoothing_factor
    record: dict[str, Any] = {"arguments": run_arguments(args, arguments or {}), "model": run_model(model)}
    train_blocks = blocks["train"]
    if isinstance(train_blocks, IterableDataset):
        train_blocks = EndlessStream(train_blocks, args.seed)
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
            # Left to itself, Trainer does not shift the labels of a compiled model.
            compute_loss_func=partial(LabelSmoother(smoothing), shift_labels=True) if smoothing else None,
            record=record,
            fresh_optimizer=fresh_optimizer,
            **trainer_metrics(tokenizer),
        )
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # arguments that exclude each other, or name what is not there
        raise UserError(str(error)) from error
    if isinstance(train_blocks, EndlessStream):
        train_blocks.blocks_per_step = trainer.get_total_train_batch_size(args)
    metrics = {"train": trainer.train(resume_from_checkpoint=checkpoint).metrics}
    # Not for Trainer to push: the model is published in the end, and then compared.
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
